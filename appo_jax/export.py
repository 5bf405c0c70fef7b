"""`appo-jax convert RUN --out DIR`: writes a run's policy as a Hugging Face folder, or its adapters as a PEFT folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from appo_jax.checkpoint import Checkpointer
from appo_jax.components import Components, initial_params, require_vocabulary
from appo_jax.config import Config, PolicyConfig
from appo_jax.config_io import load_config
from appo_jax.digests import identity
from appo_jax.errors import CheckpointError, ConfigError
from appo_jax.policy import weights
from appo_jax.policy.adapters import abstract_adapters, frozen, merged, save_adapters
from appo_jax.policy.architecture import architecture_of
from appo_jax.policy.parameters import Params, abstract_params, init_params
from appo_jax.policy.sharding import param_shardings
from appo_jax.text.export import tokenizer_files
from appo_jax.text.tokenizer import Tokenizer, policy_tokenizer


def export_run(run: Path, out: Path) -> str:
    """Write the policy of the run's newest checkpoint to the new folder `out`: of RL, else of the cold start.

    Only the parameters are read, as float32 in host memory. Adapters are merged into their weights. Returns a text that names
    the step. Raises CheckpointError if the run has no checkpoint, WeightsError if `out` exists and is not empty.
    """
    policy, out = load_config(run / "config.json").policy, weights.new_folder(out)
    where, params = newest_params(run)
    _save(out, params, policy)
    return where


def export_adapters(run: Path, out: Path) -> str:
    """Write the adapters of the run's newest RL checkpoint to the new folder `out`, as peft does; see `export_run`.

    adapter_config.json names the folder of the frozen weights, without which the adapters mean nothing: `policy.path`, or, for a
    run that began from a cold start or from random weights, or whose base_dtype has rounded the weights of `policy.path`,
    `out`/base, where they are written. Raises ConfigError for a run that trains no adapters, CheckpointError if the frozen weights
    are not those of its training.
    """
    config = load_config(run / "config.json")
    if config.policy.lora is None:
        raise ConfigError(
            f"convert {run} --adapter: the run has no policy.lora, so it has no adapters; leave --adapter out"
        )
    arch, tokenizer, out = architecture_of(config.policy), policy_tokenizer(config.policy), weights.new_folder(out)
    found = _newest(run, "rl", abstract_adapters(arch), tokenizer)
    if found is None:
        raise CheckpointError(f"{run}: no checkpoint under checkpoints/rl; it has no adapters yet")
    where, trained, meta = found
    path, base = _base(run, config, meta["base"], tokenizer)
    frozen = Path(path or out / "base").absolute()  # whoever reads it is in another folder
    save_adapters(out, trained, arch, str(frozen))
    if path is None:
        _save(out / "base", base, config.policy)
    return f"{where}; its frozen weights are those of {path or out / 'base'}"


def newest_params(run: Path, step: int | None = None, tokenizer: Tokenizer | None = None) -> tuple[str, Params]:
    """A text that names a run's newest checkpoint, and its parameters as float32 in host memory.

    `step`: that RL checkpoint instead. `tokenizer`: the one that is used with them; None: the run's. Adapters are merged. Raises
    CheckpointError if there is no such checkpoint, or if its policy was trained with another tokenizer.
    """
    config = load_config(run / "config.json")
    arch, tokenizer = architecture_of(config.policy), tokenizer or policy_tokenizer(config.policy)
    adapts = config.policy.lora is not None
    found = _newest(run, "rl", abstract_adapters(arch) if adapts else abstract_params(arch), tokenizer, step)
    if found is not None:
        where, params, meta = found
        return where, merged(_base(run, config, meta["base"], tokenizer)[1], params, arch) if adapts else params
    if step is not None:
        raise CheckpointError(
            f"{run}: no checkpoint under checkpoints/rl, so there is no step {step}; leave --step out"
        )
    if (found := _newest(run, "sft", abstract_params(arch), tokenizer)) is not None:
        return found[:2]
    raise CheckpointError(f"{run}: no checkpoint under checkpoints/rl or checkpoints/sft; it has no policy yet")


def policy_params(components: Components, run: Path | None, step: int | None = None) -> tuple[str, Params]:
    """The policy of a run's newest checkpoint, or of that of `step` (`run` is None: the config's initial policy), on the devices
    of the components' mesh, and a text that names it."""
    if run is None:
        return "the initial policy", initial_params(components.config, components.arch, components.mesh)
    where, found = newest_params(run, step, components.tokenizer)
    # Not `place`: on a mesh of one device it would leave the arrays in host memory, where no program of the mesh can use them.
    return where, jax.device_put(found, param_shardings(components.arch, components.mesh, "train"))


def _save(out: Path, params: Params, policy: PolicyConfig) -> None:
    """Write parameters of a run's policy, and its tokenizer, to the new folder `out`."""
    files = tokenizer_files(Path(policy.tokenizer or str(policy.path)))
    weights.save(out, params, architecture_of(policy), policy.path, policy_tokenizer(policy).eos_ids, files)


def starting_params(run: Path, config: Config, tokenizer: Tokenizer) -> tuple[str | None, Params]:
    """The policy with which RL began in a run that has RL checkpoints, as float32 in host memory, and the folder from which it
    comes (None: no folder): the cold start's, of the run or of `init_from`; else the weights of `policy.path`; else random ones."""
    arch, path = architecture_of(config.policy), config.policy.path
    for start in _cold_starts(run, config):
        if (found := _newest(start, "sft", abstract_params(arch), tokenizer)) is not None:
            return None, found[1]
    host = _on_host(abstract_params(arch))
    return path, init_params(arch, config.seed, host) if path is None else weights.load(path, host, jnp.float32)


def _cold_starts(run: Path, config: Config) -> list[Path]:
    """The runs whose cold start may be that of `run`, the first one before the second."""
    return [run, *([Path(config.init_from)] if config.init_from is not None else [])]


def _base(run: Path, config: Config, base_id: str, tokenizer: Tokenizer) -> tuple[str | None, Params]:
    """The frozen weights of a run with adapters, in host memory, and the folder from which they come (None: no folder).

    Raises CheckpointError if they are not those of its training.
    """
    path, params = starting_params(run, config, tokenizer)
    base = frozen(params, architecture_of(config.policy))
    if identity(base) != base_id:
        raise CheckpointError(
            f"{run}: the frozen weights of its adapters are gone: those of {', '.join(map(str, _cold_starts(run, config)))} "
            f"(checkpoints/sft) or of policy.path = {config.policy.path} are different; put the old ones back"
        )
    # Weights that `frozen` has rounded are in no folder.
    pairs = zip(jax.tree.leaves(base), jax.tree.leaves(params), strict=True)
    return None if path is None or any((a != b).any() for a, b in pairs) else path, base


def _newest(
    run: Path, phase: str, params: Params, tokenizer: Tokenizer, step: int | None = None
) -> tuple[str, Params, dict[str, Any]] | None:
    """(name, parameters, meta) of a run's newest checkpoint of a phase, or of that of `step`, in host memory; None if there is
    none yet. Raises CheckpointError if the policy was trained with another tokenizer.

    `params`: a tree of the parameters' shapes and dtypes."""
    folder = run / "checkpoints" / phase
    if not folder.exists():
        return None
    host = _on_host(params)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, host)
    checkpointer = Checkpointer(folder, keep=1, read_only=True)
    try:
        if step is None:
            found = checkpointer.restore_latest({"params": abstract}, None, partial=True)
        else:
            found = checkpointer.restore_step(step, {"params": abstract})
    finally:
        checkpointer.close()
    if found is None:
        return None
    require_vocabulary(found[2], tokenizer, folder)
    return f"step {found[0]} of {folder}", found[1]["params"], found[2]


def _on_host(tree: Params) -> Params:
    host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    return jax.tree.map(lambda _: host, tree)
