"""`appo-jax convert RUN --out DIR`: the policy of a run as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import jax

from appo_jax.checkpoint import Checkpointer
from appo_jax.components import Components, initial_params
from appo_jax.config_io import load_config
from appo_jax.errors import CheckpointError
from appo_jax.policy import weights
from appo_jax.policy.architecture import architecture_of
from appo_jax.policy.parameters import Params, abstract_params
from appo_jax.policy.sharding import param_shardings, place
from appo_jax.text.export import tokenizer_files
from appo_jax.text.tokenizer import policy_tokenizer


def export_run(run: Path, out: Path) -> str:
    """Write the policy of the run's newest RL checkpoint (of its cold start before RL has one) to the new folder `out`.

    Only the parameters are read, as float32 in host memory. Returns a line that names the step. Raises CheckpointError
    where the run has no checkpoint, WeightsError if `out` exists and is not empty.
    """
    policy = load_config(run / "config.json").policy
    arch, tokenizer = architecture_of(policy), policy_tokenizer(policy)
    where, params = newest_params(run)
    files = tokenizer_files(Path(policy.tokenizer or str(policy.path)))
    weights.save(out, params, arch, policy.path, tokenizer.eos_ids, files)
    return where


def newest_params(run: Path) -> tuple[str, Params]:
    """The parameters of a run's newest checkpoint, float32 in host memory, and which step it is. Raises CheckpointError."""
    arch = architecture_of(load_config(run / "config.json").policy)
    host = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=host), abstract_params(arch))
    for phase in ("rl", "sft"):
        folder = run / "checkpoints" / phase
        if not folder.exists():
            continue
        checkpointer = Checkpointer(folder, keep=1, read_only=True)
        try:
            found = checkpointer.restore_latest({"params": params}, None, partial=True)
        finally:
            checkpointer.close()
        if found is not None:
            return f"step {found[0]} of {folder}", found[1]["params"]
    raise CheckpointError(f"{run}: no checkpoint under checkpoints/rl or checkpoints/sft; it has no policy yet")


def policy_params(components: Components, run: Path | None) -> Params:
    """The policy of a run's newest checkpoint, or that of the config's `policy.path`, laid out for the components' mesh."""
    if run is None:
        return initial_params(components.config, components.arch, components.mesh)
    _, found = newest_params(run)
    return place(found, param_shardings(components.arch, components.mesh, "train"), components.mesh)
