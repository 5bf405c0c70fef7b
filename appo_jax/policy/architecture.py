"""Conversion between a Hugging Face config.json and Architecture.

The supported model classes (`parameters.FAMILIES`) read a fixed set of config fields (their configuration_*.py and modeling_*.py
in transformers). Each field that could change what the model computes is either part of Architecture, or is refused here with
an error that names it. A field that config.json lacks has transformers' value.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from appo_jax.config import Architecture, Config, PolicyConfig, RopeScaling, YarnScaling
from appo_jax.config.rules import impossible
from appo_jax.errors import ConfigError, WeightsError
from appo_jax.policy.parameters import FAMILIES, adapted, check_family


def from_hf(config: Mapping[str, Any]) -> Architecture:
    """Architecture of a config.json. Raises WeightsError that lists every unsupported or missing field."""
    if not isinstance(config, Mapping):
        raise WeightsError(f"config.json: expected an object with the model's settings, got {config!r:.100}")
    names = config.get("architectures") or [None]
    family = next((name for name, known in FAMILIES.items() if known.hf == names[0]), None)
    if family is None:
        expected = ", ".join(known.hf for known in FAMILIES.values())
        raise WeightsError(f"config.json: architectures = {names}: expected one of {expected}")

    given, config = config, {**FAMILIES[family].defaults, **config}
    problems = _unsupported(config, family, given)
    problems += _numbers(config)
    ropes = (config.get(name) for name in ("rope_scaling", "rope_parameters"))  # if both are given, the first counts
    rope: Any = next((given for given in ropes if given not in (None, {})), {})
    scaling, rope_problems = _rope_scaling(rope, config.get("max_position_embeddings"))
    problems += rope_problems
    if problems:
        raise _unloadable(problems)

    num_heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
    arch = Architecture(
        vocab_size=config["vocab_size"],
        width=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_dim=head_dim,
        mlp_width=config["intermediate_size"],
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        rope_scaling=scaling,
        max_positions=config.get("max_position_embeddings"),
        norm_eps=float(config.get("rms_norm_eps") or 1e-6),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        family=family,
    )
    if problems := list(impossible(arch)):
        raise _unloadable(problems)
    return arch


def _unloadable(problems: Sequence[str]) -> WeightsError:
    return WeightsError("config.json: cannot be loaded as it is:\n" + "\n".join(f"- {p}" for p in problems))


def to_hf(arch: Architecture) -> dict[str, Any]:
    """The config.json of an Architecture, with field names that old and new transformers and vLLM read."""
    family = FAMILIES[arch.family]
    config: dict[str, Any] = {
        "architectures": [family.hf],
        "model_type": arch.family,
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.width,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_heads,
        "num_key_value_heads": arch.num_kv_heads,
        "head_dim": arch.head_dim,
        "intermediate_size": arch.mlp_width,
        "hidden_act": "silu",
        "rms_norm_eps": arch.norm_eps,
        "rope_theta": arch.rope_theta,
        "tie_word_embeddings": arch.tie_embeddings,
        "attention_dropout": 0.0,
        **family.config,
    }
    if arch.max_positions is not None:
        config["max_position_embeddings"] = arch.max_positions
    if isinstance(scaling := arch.rope_scaling, YarnScaling):
        config["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_max_position,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
        }
        if scaling.attention_factor is not None:
            config["rope_scaling"]["attention_factor"] = scaling.attention_factor
    elif scaling is not None:
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
    return config


def read_architecture(folder: str | Path) -> Architecture:
    """Architecture of a Hugging Face folder. Raises WeightsError that names the file."""
    file = Path(folder) / "config.json"
    try:
        return from_hf(json.loads(file.read_text(encoding="utf-8")))
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
    ) as error:  # a field of another type than expected
        raise WeightsError(f"{file}: expected the config.json of a Hugging Face model: {error}") from error
    except WeightsError as error:
        raise WeightsError(f"{folder}: {error}") from error


def architecture_of(config: PolicyConfig) -> Architecture:
    """The policy's architecture: that of its folder if `policy.path` is set, else `policy.architecture`.

    Raises ConfigError for an unknown family, and if both are given and differ (it lists the fields); WeightsError for a
    folder that cannot be read.
    """
    if config.path is None:
        assert config.architecture is not None  # config.rules
        check_family(config.architecture)
        return adapted(config.architecture, config.lora)
    found, stated = read_architecture(config.path), config.architecture
    if stated is None:
        return adapted(found, config.lora)
    # `num_tokens` and `missing_ids` come from the tokenizer later; the config may leave `max_positions` out.
    left_out = ("num_tokens", "missing_ids", *(("max_positions",) if stated.max_positions is None else ()))
    names = [f.name for f in dataclasses.fields(Architecture) if f.name not in left_out]
    differing = [
        f"policy.architecture.{name} = {getattr(stated, name)!r}, but {config.path}/config.json says "
        f"{getattr(found, name)!r}: correct it, or leave policy.architecture out"
        for name in names
        if getattr(stated, name) != getattr(found, name)
    ]
    if differing:
        raise ConfigError.of(differing)
    return adapted(found, config.lora)


def check_positions(arch: Architecture, config: Config) -> None:
    """Raises ConfigError if rollouts or demonstrations may be longer than the policy's maximum number of positions."""
    if arch.max_positions is None:
        return
    limit, original = arch.max_positions, arch.max_positions
    if isinstance(arch.rope_scaling, YarnScaling):
        original = arch.rope_scaling.original_max_position
        limit = max(limit, int(arch.rope_scaling.factor * original))
    rollout = config.rollout
    lengths = {
        "rollout.max_prompt_tokens + rollout.max_response_tokens": rollout.max_prompt_tokens
        + rollout.max_response_tokens
    }
    if config.sft.steps:
        lengths["sft.max_tokens"] = config.sft.max_tokens

    def advice(length: int) -> str:
        if config.policy.path is None:
            return "lower it, or raise policy.architecture.max_positions"
        if isinstance(arch.rope_scaling, RopeScaling):
            return "lower it (rope_type llama3 cannot be extended)"
        return (
            "lower it, or extend them by yarn with rope_scaling = "
            f'{{"rope_type": "yarn", "factor": {math.ceil(length / original)}.0, "original_max_position_embeddings": {original}}} '
            f"in {config.policy.path}/config.json"
        )

    extended = "" if limit == arch.max_positions else ", extended by yarn"
    problems = [
        f"{fields} = {length} exceeds the {limit} positions that the policy was made for (max_position_embeddings{extended}): "
        + advice(length)
        for fields, length in lengths.items()
        if length > limit
    ]
    if problems:
        raise ConfigError.of(problems)


def for_tokenizer(arch: Architecture, num_tokens: int, missing_ids: Sequence[int] = ()) -> Architecture:
    """The architecture with the tokenizer's `num_tokens` and `missing_ids`, which mark the embedding rows that no token uses.

    Raises ConfigError for a tokenizer with more ids than the embedding has rows.
    """
    if num_tokens > arch.vocab_size:
        raise ConfigError(
            f"policy.tokenizer: it has {num_tokens} ids, but the policy's embedding has {arch.vocab_size} rows (vocab_size): "
            "use the tokenizer that the policy was trained with, or raise policy.architecture.vocab_size for a new policy"
        )
    beyond = num_tokens if num_tokens < arch.vocab_size else None
    return dataclasses.replace(arch, num_tokens=beyond, missing_ids=tuple(missing_ids))


def _numbers(config: Mapping[str, Any]) -> list[str]:
    """One message for each size that is missing, and for each number that is none or is not above 0."""
    required = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    whole = (*required, "num_key_value_heads", "head_dim", "max_position_embeddings")
    types = dict.fromkeys(whole, int) | dict.fromkeys(("rms_norm_eps", "rope_theta"), (int, float))
    problems = [f"{key}: missing" for key in required if config.get(key) is None]
    for key, kind in types.items():
        value = config.get(key)
        if value is not None and not _is_above(value, kind):
            problems.append(f"{key} = {value!r}: expected a {'whole ' if kind is int else ''}number above 0")
    return problems


def _is_above(value: Any, kind: Any, bound: float = 0) -> bool:
    """Whether a value of a JSON file is a finite number of this type above the bound."""
    return isinstance(value, kind) and not isinstance(value, bool) and bound < value < math.inf


def _unsupported(config: Mapping[str, Any], family: str, given: Mapping[str, Any]) -> list[str]:
    """One message for each field with an unsupported value, which would change what the model computes. `given`: config.json, which
    may lack fields of `config`."""
    supported: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("silu", "swish"),
        "quantization_config": (),
        "partial_rotary_factor": (1.0,),
    } | {key: (value,) for key, value in FAMILIES[family].config.items()}
    problems = [
        f"{key} = {config[key]!r}{'' if key in given else ' (the default of a missing field)'}: not supported"
        + (f", only {allowed[0]!r} is" if allowed else "")
        for key, allowed in supported.items()
        if config.get(key) is not None and config[key] not in allowed
    ]
    other = sorted(set(config.get("layer_types") or ()) - {"full_attention"})
    if other:
        problems.append(f"layer_types holds {', '.join(other)}: not supported, only 'full_attention' is")
    return problems


def _rope_scaling(
    rope: Mapping[str, Any], max_positions: int | None
) -> tuple[RopeScaling | YarnScaling | None, list[str]]:
    """The scaling (None: plain rope), and a message for each missing or unsupported field."""
    if not isinstance(rope, Mapping):
        return None, [f'rope_scaling = {rope!r}: expected an object such as {{"rope_type": "yarn", "factor": 4.0}}']
    kind = rope.get("rope_type", rope.get("type", "default"))
    only = {"partial_rotary_factor": 1.0, "mscale": None, "mscale_all_dim": None, "truncate": True}
    problems = [
        f"rope {key} = {rope[key]!r}: not supported, only {value!r} is"
        for key, value in only.items()
        if rope.get(key, value) != value
    ]
    if any(isinstance(value, Mapping) for value in rope.values()):
        return None, [*problems, "rope_parameters: one set per layer type is not supported"]
    if kind == "default":
        return None, problems
    if kind not in ("llama3", "yarn"):
        return None, [*problems, f"rope_type = {kind!r}: not supported, only 'default', 'llama3' and 'yarn' are"]
    rope = {"original_max_position_embeddings": max_positions} | {k: v for k, v in rope.items() if v is not None}
    fields = ["factor", "original_max_position_embeddings"]
    fields += ["low_freq_factor", "high_freq_factor"] if kind == "llama3" else []
    missing = [f"rope {key}: missing (rope_type {kind} needs it)" for key in fields if rope.get(key) is None]
    problems += missing + _rope_numbers(rope, kind)
    if problems:
        return None, problems
    factor, original = float(rope["factor"]), int(rope["original_max_position_embeddings"])
    if kind == "llama3":
        return RopeScaling(factor, float(rope["low_freq_factor"]), float(rope["high_freq_factor"]), original), []
    yarn = YarnScaling(
        factor,
        original,
        float(rope.get("beta_fast") or 32),
        float(rope.get("beta_slow") or 1),
        rope.get("attention_factor"),
    )
    return yarn, []


def _rope_numbers(rope: Mapping[str, Any], kind: str) -> list[str]:
    """One message for each number of a scaling by which no frequency can be computed."""
    whole = rope.get("original_max_position_embeddings")
    problems = []
    if whole is not None and not _is_above(whole, int):
        problems.append(f"rope original_max_position_embeddings = {whole!r}: expected a whole number above 0")
    others = (
        ["low_freq_factor", "high_freq_factor"] if kind == "llama3" else ["beta_fast", "beta_slow", "attention_factor"]
    )
    for key in ("rope_theta", "factor", *others):
        value = rope.get(key)
        if value is not None and not _is_above(value, (int, float)):
            problems.append(f"rope {key} = {value!r}: expected a number above 0")
        elif key == "factor" and kind == "yarn" and value is not None and value < 1:
            problems.append(f"rope factor = {value!r}: expected 1 or more, because yarn extends the positions")
    return problems
