"""How processes on this machine that stand for hosts find each other."""

from __future__ import annotations


def variables_of_host(number: int, hosts: int, address: str) -> dict[str, str]:
    """The variables by which host `number` finds the others, as Open MPI sets them. `address`: where the first host listens."""
    return {
        "APPO_DISTRIBUTED": "1", "JAX_COORDINATOR_ADDRESS": address, "OMPI_MCA_orte_hnp_uri": "0.0;tcp://127.0.0.1:1",
        "OMPI_COMM_WORLD_SIZE": str(hosts), "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_RANK": str(number),
    }  # fmt: skip
