"""The policy: its weights, its shape, its tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal, get_args

from annotated_types import Ge, MinLen
from pydantic import Discriminator, NonNegativeInt, PositiveFloat, PositiveInt


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.x frequency scaling (`rope_type: llama3` of a Hugging Face config)."""

    factor: PositiveFloat
    """The slow frequencies are divided by this (`factor`; Llama 3.1: 8)."""
    low_freq_factor: PositiveFloat
    """Wavelengths above original_max_position / this are scaled in full (`low_freq_factor`; Llama 3.1: 1)."""
    high_freq_factor: PositiveFloat
    """Wavelengths below original_max_position / this are kept as they are (`high_freq_factor`; Llama 3.1: 4)."""
    original_max_position: PositiveInt
    """Tokens of context before scaling (`original_max_position_embeddings`; Llama 3.1: 8192)."""
    kind: Literal["llama3"] = "llama3"
    """`rope_type`, which tells the two kinds apart in a file."""


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071, `rope_type: yarn`), by which Qwen2.5 and Qwen3 are extended beyond their training context."""

    factor: Annotated[float, Ge(1)]
    """The factor by which the context is extended (`factor`; Qwen2.5, Qwen3: 4)."""
    original_max_position: PositiveInt
    """Tokens of context before scaling (`original_max_position_embeddings`; Qwen2.5, Qwen3: 32768)."""
    beta_fast: PositiveFloat = 32.0
    """Frequencies that turn more often than this in the original context are kept (`beta_fast`)."""
    beta_slow: PositiveFloat = 1.0
    """Frequencies that turn less often than this are divided by the factor (`beta_slow`); between the two, in part."""
    attention_factor: PositiveFloat | None = None
    """Rotated queries and keys are multiplied by it (`attention_factor`). None: 0.1 · ln(factor) + 1."""
    kind: Literal["yarn"] = "yarn"
    """`rope_type`, which tells the two kinds apart in a file."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Shape of the decoder.

    The name that a Hugging Face config.json has for a field stands in brackets.
    """

    vocab_size: PositiveInt
    """V: rows of the embedding (`vocab_size`). May exceed the tokenizer's ids: models pad it."""
    width: PositiveInt
    """D: width of the residual stream (`hidden_size`)."""
    num_layers: PositiveInt
    """Decoder layers (`num_hidden_layers`)."""
    num_heads: PositiveInt
    """H: query heads, a multiple of num_kv_heads (`num_attention_heads`)."""
    num_kv_heads: PositiveInt
    """K: key/value heads (`num_key_value_heads`)."""
    head_dim: PositiveInt
    """E: width of a head, even (`head_dim`)."""
    mlp_width: PositiveInt
    """F: inner width of the gated MLP (`intermediate_size`)."""
    rope_theta: PositiveFloat = 10_000.0
    """Base of the rotary frequencies (`rope_theta`)."""
    rope_scaling: Annotated[RopeScaling | YarnScaling, Discriminator("kind")] | None = None
    """Scaling of the rotary frequencies. None: no scaling."""
    norm_eps: PositiveFloat = 1e-6
    """ε of RMSNorm (`rms_norm_eps`)."""
    tie_embeddings: bool = True
    """Whether the output layer is the embedding, transposed (`tie_word_embeddings`)."""
    num_tokens: PositiveInt | None = None
    """Ids that the tokenizer has. Rows of the embedding beyond them are padding, with probability 0 everywhere. A run sets it
    from its tokenizer. None: vocab_size."""
    missing_ids: tuple[NonNegativeInt, ...] = ()
    """Ids below num_tokens that no token has: gaps of the tokenizer's vocabulary. They too have probability 0 everywhere, and a
    run sets them from its tokenizer."""
    max_positions: PositiveInt | None = None
    """Tokens of prompt and response together for which the policy was trained (`max_position_embeddings`); yarn extends
    it. A config with longer rollouts is refused. None: no limit."""
    family: str = "llama"
    """Which parameters a layer has and how it uses them: a name in the table FAMILIES of policy/parameters.py, which is
    `model_type` in config.json (llama also for SmolLM2, qwen2 also for Qwen2.5)."""


Adaptable = Literal["q", "k", "v", "o", "gate", "up", "down"]


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters (arXiv 2106.09685), which RL trains in place of the weights.

    For x·W, a layer computes x·W + alpha/rank · (x·A)·B. A starts as random numbers, B at 0.
    """

    rank: PositiveInt = 16
    """r: columns of A and rows of B."""
    alpha: PositiveFloat = 32.0
    """The adapter's output is multiplied by alpha / rank."""
    targets: Annotated[tuple[Adaptable, ...], MinLen(1)] = get_args(Adaptable)
    """The matrices of each layer that have an adapter: queries, keys, values and output of attention; gate, up and down of the
    MLP."""
    base_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """The dtype of the frozen weights, which are those of the cold start (norm scales: always float32)."""


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """The policy that a run starts from."""

    path: str | None = None
    """Hugging Face folder to start from: config.json, safetensors, tokenizer.json. None: random weights."""
    architecture: Architecture | None = None
    """Shape of a policy that starts from random weights. If `path` is given too, the folder must have this shape;
    `appo-jax plan` then works without the weights."""
    tokenizer: str | None = None
    """A sentencepiece .model file, or a folder with tokenizer.json. None: that of `path`."""
    template_variables: Mapping[str, bool | int | float | str] = dataclasses.field(default_factory=dict)
    """Variables for the tokenizer's chat template, such as enable_thinking (Qwen3). On the command line: NAME VALUE
    NAME VALUE …"""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of matrix products; parameters that are trained are float32. auto: bfloat16 on accelerators, float32 on CPU."""
    lora: LoRAConfig | None = None
    """Train adapters instead of the weights. The cold start trains the weights all the same. None: RL trains all parameters."""
