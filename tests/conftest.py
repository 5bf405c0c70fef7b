"""Every test runs on the CPU, with the shared data folder where the environment names one."""

import dataclasses
import os
import socket

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from appo_jax import heartbeat
from appo_jax.config import Config
from appo_jax.config_io import check, load_config
from appo_jax.prepare import prepare_world

# The first example of a jitted function pays for its compilation: no deadline per example.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.py"


@pytest.fixture(autouse=True)
def own_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test's run was doing is not what another's does."""
    monkeypatch.setattr(heartbeat, "_life", heartbeat._Life())


@pytest.fixture(scope="session")
def short_quickstart() -> Callable[[Path], Config]:
    """The quickstart's policy and world in a folder of their own, with short steps."""

    def config(folder: Path) -> Config:
        c = load_config(QUICKSTART)
        return dataclasses.replace(
            c,
            prompts_per_step=4,
            prompts_per_minibatch=2,
            checkpoint_every=1,
            policy=dataclasses.replace(c.policy, tokenizer=str(folder / "world.model")),
            data=dataclasses.replace(c.data, path=str(folder / "world")),
            rollout=dataclasses.replace(c.rollout, max_response_tokens=64, decode_rows=24),
            sft=dataclasses.replace(c.sft, batch_size=4),
        )

    return config


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, short_quickstart: Callable[[Path], Config]) -> Config:
    """The smallest run there is, with its data: a cold start of a step and two steps of APPO, each saved."""
    folder = tmp_path_factory.mktemp("tiny")
    c = short_quickstart(folder)
    shape = dataclasses.replace(
        c.policy.architecture, width=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, mlp_width=32
    )
    config = dataclasses.replace(
        c,
        run_dir=str(folder / "run"),
        steps=2,
        prompts_per_step=2,
        policy=dataclasses.replace(c.policy, architecture=shape),
        rollout=dataclasses.replace(
            c.rollout, num_initial=2, budget=4, max_response_tokens=32, max_result_tokens=16, decode_rows=8
        ),
        branching=dataclasses.replace(c.branching, num_branch_points=1),
        sft=dataclasses.replace(c.sft, steps=1, batch_size=2),
        eval=dataclasses.replace(c.eval, num_prompts=2),
    )
    check(config)
    prepare_world(config)
    return config


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables under which processes of this session share what they compile."""
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(tmp_path_factory.mktemp("xla"))
    return {
        "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip


@pytest.fixture
def one_of() -> Callable[[int, int], dict[str, str]]:
    """Variables by which process `i` of `hosts` on this machine finds the others, as Open MPI would set them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"

    def variables(i: int, hosts: int) -> dict[str, str]:
        return {
            "APPO_DISTRIBUTED": "1", "JAX_COORDINATOR_ADDRESS": address, "OMPI_MCA_orte_hnp_uri": "0.0;tcp://127.0.0.1:1",
            "OMPI_COMM_WORLD_SIZE": str(hosts), "OMPI_COMM_WORLD_RANK": str(i), "OMPI_COMM_WORLD_LOCAL_RANK": "0",
        }  # fmt: skip

    return variables


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data sets (gsm8k/, hotpotqa/, ...); tests that need it are skipped without APPO_JAX_DATA."""
    folder = os.environ.get("APPO_JAX_DATA")
    if not folder:
        pytest.skip("APPO_JAX_DATA does not name the folder of the data sets")
    return Path(folder)
