"""Every setting of a run, as frozen dataclasses.

`Config` is the whole; each room of the program receives only its own part. Defaults are the paper's where the paper
gives a number. `validate` holds the rules that span fields; it runs before any device is touched.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from appo_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.x frequency scaling (`rope_type: llama3` of an HF config)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Shape of the decoder. Qwen2/2.5: `qkv_bias`. Qwen3: `qk_norm`. Llama 3, SmolLM2: neither."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    path: str | None = None
    """Hugging Face folder (config.json, safetensors, tokenizer.json) to start from."""
    architecture: Architecture | None = None
    """Shape of a policy that starts from random weights. Beside `path` it states what the folder must hold, so that
    `appo-jax plan` works without the weights."""
    tokenizer: str | None = None
    """A sentencepiece .model or a folder with tokenizer.json. Default: `path`."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Matmul precision. auto: bfloat16 on accelerators, float32 on CPU."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    source: Literal["world", "gsm8k", "appo_rl"] = "world"
    """world: the embedded one (generated). gsm8k: a folder with train.jsonl and test.jsonl. appo_rl: the official parquet files."""
    path: str | None = None
    """Folder of the data. For `world`, where the generated TFDS dataset is kept."""
    seed: int = 0
    """Order of the prompts, and the world's content."""
    malformed: Literal["fatal", "skip"] = "fatal"
    """What to do with a line that cannot be read. Either way the file and the line are named."""
    system_prompt: str | None = None
    """Replaces the source's own system prompt."""


@dataclasses.dataclass(frozen=True)
class PythonToolConfig:
    isolation: Literal["bubblewrap", "process"] = "bubblewrap"
    """bubblewrap: namespaces, seccomp, no network. process: resource limits only, for policies that are trusted."""
    timeout: float = 5.0
    """Seconds of wall time per call."""
    memory_mb: int = 512
    max_output_chars: int = 4096
    preload: tuple[str, ...] = ("math", "numpy", "sympy")
    """Modules imported once, before the first rollout is forked."""


@dataclasses.dataclass(frozen=True)
class SearchToolConfig:
    corpus: str | None = None
    """jsonl, json or parquet with `title` and `text`. The embedded world brings its own."""
    url: str | None = None
    """An HTTP retriever or web-search service, instead of a local index."""
    provider: Literal["search_r1", "serper"] = "search_r1"
    """What `url` speaks: Search-R1's retriever protocol, or Serper's web search (key in SERPER_API_KEY)."""
    max_per_second: float = 0.0
    """Requests to `url` per second; 0: no limit."""
    cache: str | None = None
    """SQLite file of answered queries, shared between processes. Without corpus and url it alone answers."""
    cache_fill: str | None = None
    """JSON file `{query: text}` whose answers are put into `cache` at start."""
    top_k: int = 3
    timeout: float = 10.0
    max_retries: int = 3
    allow_private: bool = False
    """Whether `url` may be a private, link-local or loopback address."""


@dataclasses.dataclass(frozen=True)
class ToolsConfig:
    enabled: tuple[str, ...] = ("python", "search")
    """Tools a rollout may call: python, search, or `package.module:factory` of your own."""
    call_format: Literal["tags", "json"] = "tags"
    """tags: <python>…</python>, as in the paper. json: {"name": …, "arguments": …} in <tool_call>."""
    max_concurrency: int = 8
    """Calls of one tool that run at the same time."""
    python: PythonToolConfig = PythonToolConfig()
    search: SearchToolConfig = SearchToolConfig()


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    num_initial: int = 4
    """N: full rollouts per prompt from the policy at the start of the step."""
    budget: int = 16
    """M: rollouts per prompt, branches included."""
    max_prompt_tokens: int = 1024
    max_response_tokens: int = 4096
    """Sampled tokens and tool results together."""
    max_result_tokens: int = 512
    """A tool result is cut here, with a visible mark."""
    max_tool_calls: int = 6
    max_seconds: float = 600.0
    """Wall time of one rollout, tools included."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: off. When top_p or top_k cut the distribution, log-probs are those of the cut distribution."""
    decode_rows: int = 256
    """Rows decoded together. A row whose rollout is over goes on with the next one that waits."""
    share_prefix: bool = True
    """False: every continuation prefills its whole prefix. The reference that tests and benchmarks compare with."""


@dataclasses.dataclass(frozen=True)
class BranchingConfig:
    num_branch_points: int = 3
    """B: positions per rollout where a new rollout is drawn."""
    num_loops: int = 1
    """L: rounds of scoring and branching."""
    tau: float = 32.0
    """Half-life, in sampled tokens, of the discount γ = 2^(−1/τ) in the future value Ω."""
    clip_low: float = 1.0
    clip_high: float = 1.2
    """Ω is clipped to [clip_low, clip_high] before its z-score."""
    score: Literal["product", "entropy", "future", "additive", "entropy_change", "random_turn"] = "product"
    """product: Z(Ω)·Z(H), the paper. entropy, future, additive are its ablations; additive weighs both with the two
    weights below. entropy_change (ARPO) and random_turn (Tree-GRPO) branch where a turn begins instead."""
    entropy_weight: float = 1.0
    future_weight: float = 1.0
    gate: Literal["both_positive", "literal"] = "both_positive"
    """both_positive: candidates need Z(H) > 0 and Z(Ω) > 0, filled up by the literal product. literal: the product as it is."""
    skip_blank: bool = True
    """Leave out tokens that decode to whitespace or punctuation alone."""
    refresh: Literal["minibatch", "step"] = "minibatch"
    """When branches are scored and drawn: under the current policy of every mini-batch, or once, at the step's start."""
    include_token: bool = False
    """Official code: the prefix of a branch includes the scored token."""
    allocation: Literal["per_rollout", "pooled", "proportional"] = "per_rollout"
    """per_rollout: top-B of each rollout, a branch each. pooled: the prompt's best positions (official code).
    proportional: top-B of each rollout share the prompt's budget in proportion to their score (Theorem 1)."""
    min_spacing: int = 1
    """Sampled tokens between two branch points of one rollout."""


@dataclasses.dataclass(frozen=True)
class AdvantageConfig:
    base: Literal["paper", "shared_prefix", "joint", "init_only", "global", "tree", "turn"] = "paper"
    """paper: eq. 6. shared_prefix: official code. joint: one group of all. init_only: the initial rollouts (GRPO).
    global: returns normalised over the mini-batch (REINFORCE++). tree: within the tree plus over all (Tree-GRPO).
    turn: episode plus turns that began in equal states (GiGPO)."""
    scaling: Literal["offset", "plain"] = "offset"
    """offset: A = A_base · (1 + b · clip(Ω)), eq. 7. plain: A = A_base · clip(Ω) (FIPO)."""
    future_weight: float = 0.5
    """b of eq. 7."""
    clip_low: float = 1.0
    clip_high: float = 1.2
    """Ω is clipped to [clip_low, clip_high] here. One-sided, as in the paper: clip_low = 1. Two-sided: 0.8 and 1.2."""


@dataclasses.dataclass(frozen=True)
class LossConfig:
    clip_low: float = 0.2
    clip_high: float = 0.2
    """ε of eq. 8: the ratio is clipped to [1 − clip_low, 1 + clip_high]."""
    surrogate: Literal["clip", "gppo", "cispo"] = "clip"
    """clip: PPO's, eq. 8. gppo: its value, but clipped tokens keep a bounded gradient. cispo: sg(clip(ρ))·A·log π."""
    dual_clip: float = 0.0
    """c: with A < 0 the surrogate is at least c·A (official code: 3). 0: off; else above 1."""
    max_ratio: float = 0.0
    """Tokens with a ratio above it are left out of the loss (official code: 3). 0: off; else above 1."""
    max_dual_clipped: int = -1
    """Rollouts with more dual-clipped tokens than this are left out of the loss (official code: 1). −1: off."""
    aggregation: Literal["paper", "token_mean", "seq_mean", "constant"] = "paper"
    kl_weight: float = 0.0
    """β: weight of KL(π_θ‖π_ref); 0 keeps no reference policy."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """With r = π_ref/π_θ: k1 = −log r, k2 = (log r)²/2, k3 = r − 1 − log r."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Whether β·KL is a term of the loss, or is taken off the reward token by token, under the policy that drew it."""
    entropy_weight: float = 0.0
    """Weight of the entropy bonus."""
    sampler_cap: float = 0.0
    """C: tokens are weighted by min(π_old/π_sampler, C), which corrects what the sampler rounds otherwise. 0: off."""
    mask_truncated: bool = False
    """Leave rollouts that hit a limit out of the loss."""


Remat = Literal["none", "matmuls", "layers"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float = 1e-6
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    b1: float = 0.9
    b2: float = 0.999
    micro_batch: int = 0
    """Rollouts per forward-backward pass; gradients are accumulated. 0: the whole mini-batch at once."""
    remat: Remat = "none"
    """What the backward pass computes again instead of keeping it. none: nothing; matmuls: all but each layer's matrix
    products; layers: all but each layer's input. From left to right less memory and more time."""


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    steps: int = 0
    """0: no cold start."""
    batch_size: int = 128
    """Rows of `max_tokens` tokens; whole traces are packed into them."""
    max_tokens: int = 4096
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: for policies that start from random weights; it needs half the steps there."""
    learning_rate: float = 7e-6
    weight_decay: float = 0.1
    warmup_fraction: float = 0.05
    micro_batch: int = 0
    """Rows per forward-backward pass. 0: the whole batch at once."""
    checkpoint_every: int = 500


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    num_prompts: int = 200
    """Held-out questions; 0 for all."""
    every: int = 0
    """Steps between evaluations during training; 0: only before and after."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    slices: int = 1
    """Slices joined over the data-centre network; they divide the data axis."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    __pydantic_config__ = {"extra": "forbid", "strict": True}  # noqa: RUF012  # how config_io reads it, nested parts included

    run_dir: str = "runs/default"
    """Everything the run writes. An existing run of the same config is continued."""
    init_from: str | None = None
    """Run directory whose cold-started policy this run begins with, instead of its own cold start."""
    algorithm: Literal[
        "appo", "grpo", "reinforce_pp", "dapo", "gppo", "cispo", "gigpo", "arpo", "tree_grpo", "fipo"
    ] = "appo"
    """What is trained; appo_jax/algorithms.py says which of the fields below each name sets itself."""
    seed: int = 0
    steps: int = 100
    prompts_per_step: int = 128
    prompts_per_minibatch: int = 16
    reward: str = "robust"
    """robust, official, or `package.module:function` of your own."""
    tool_bonus: float = 0.1
    """Added when the answer earns something and both tools were used."""
    overlong_buffer: int = 0
    """DAPO's soft punishment: over the last so many tokens of room a response's reward falls by up to 1. 0: off."""
    max_resamples: int = 0
    """Dynamic sampling: so many times at most, prompts whose rewards are all equal are replaced by others. 0: off."""
    max_sampled_tokens: int = 0
    """Stop training once this many tokens have been sampled (0: no limit), for comparisons at an equal budget."""
    checkpoint_every: int = 10
    keep_checkpoints: int = 3
    policy: PolicyConfig = PolicyConfig()
    data: DataConfig = DataConfig()
    tools: ToolsConfig = ToolsConfig()
    rollout: RolloutConfig = RolloutConfig()
    branching: BranchingConfig = BranchingConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    sft: SFTConfig = SFTConfig()
    eval: EvalConfig = EvalConfig()
    mesh: MeshConfig = MeshConfig()


BRANCHING = ("appo", "arpo", "tree_grpo")  # algorithms that fill the budget by branching


def validate(config: Config) -> None:
    """Check every rule between fields. Raises ConfigError that lists all violations, each with the field to change."""
    problems: list[str] = []

    def need(condition: bool, message: str) -> None:
        if not condition:
            problems.append(message)

    c, r, b = config, config.rollout, config.branching
    positive = {
        "steps": c.steps, "prompts_per_step": c.prompts_per_step, "prompts_per_minibatch": c.prompts_per_minibatch,
        "checkpoint_every": c.checkpoint_every, "keep_checkpoints": c.keep_checkpoints,
        "rollout.num_initial": r.num_initial, "rollout.budget": r.budget, "rollout.max_prompt_tokens": r.max_prompt_tokens,
        "rollout.max_response_tokens": r.max_response_tokens, "rollout.max_result_tokens": r.max_result_tokens,
        "rollout.temperature": r.temperature, "rollout.max_seconds": r.max_seconds, "rollout.decode_rows": r.decode_rows,
        "branching.num_branch_points": b.num_branch_points, "branching.num_loops": b.num_loops, "branching.tau": b.tau,
        "branching.min_spacing": b.min_spacing, "optimizer.learning_rate": c.optimizer.learning_rate,
        "sft.batch_size": c.sft.batch_size, "sft.learning_rate": c.sft.learning_rate,
        "sft.checkpoint_every": c.sft.checkpoint_every,
        "tools.max_concurrency": c.tools.max_concurrency, "tools.python.timeout": c.tools.python.timeout,
        "mesh.data": c.mesh.data, "mesh.fsdp": c.mesh.fsdp, "mesh.tensor": c.mesh.tensor, "mesh.slices": c.mesh.slices,
    }  # fmt: skip
    for name, value in positive.items():
        need(value > 0, f"{name} = {value}: must be greater than 0")
    if problems:
        raise ConfigError.of(problems)

    need(
        c.prompts_per_step % c.prompts_per_minibatch == 0,
        f"prompts_per_step = {c.prompts_per_step} is not a multiple of prompts_per_minibatch = {c.prompts_per_minibatch}: "
        "every mini-batch must be full",
    )
    full = r.num_initial * (b.num_branch_points + 1) ** b.num_loops
    if c.algorithm in BRANCHING:
        need(
            r.budget > r.num_initial,
            f"rollout.budget = {r.budget} leaves no room for branches beside rollout.num_initial = {r.num_initial}: "
            f"raise it, up to N·(B+1)^L = {full}",
        )
    if c.algorithm == "appo":
        need(
            r.budget <= full,
            f"rollout.budget = {r.budget} cannot be filled: N·(B+1)^L = {r.num_initial}·({b.num_branch_points}+1)^"
            f"{b.num_loops} = {full}; lower rollout.budget or raise branching.num_branch_points",
        )
    need(
        b.clip_low < b.clip_high, f"branching.clip_low = {b.clip_low} must be below branching.clip_high = {b.clip_high}"
    )
    a = c.advantage
    need(a.clip_low <= a.clip_high, f"advantage.clip_low = {a.clip_low} exceeds advantage.clip_high = {a.clip_high}")
    need(a.clip_low >= 0, f"advantage.clip_low = {a.clip_low}: must not be negative, Ω never is")
    need(
        not (b.score in ("entropy_change", "random_turn") and b.allocation != "per_rollout"),
        f"branching.allocation = {b.allocation!r}: branching.score = {b.score!r} has no score to share by; set per_rollout",
    )
    lo = c.loss
    for name in ("dual_clip", "max_ratio"):
        value = getattr(lo, name)
        need(value == 0 or value > 1, f"loss.{name} = {value}: must be above 1, or 0 (off)")
    need(lo.max_dual_clipped >= -1, f"loss.max_dual_clipped = {lo.max_dual_clipped}: must be a count, or -1 (off)")
    need(
        lo.max_dual_clipped < 0 or lo.dual_clip > 0,
        f"loss.max_dual_clipped = {lo.max_dual_clipped} counts dual-clipped tokens: set loss.dual_clip too (official: 3)",
    )
    for name in ("kl_weight", "entropy_weight", "sampler_cap"):
        need(getattr(lo, name) >= 0, f"loss.{name} = {getattr(lo, name)}: must be 0 (off) or more")
    need(
        lo.surrogate == "clip" or lo.dual_clip == 0,
        f"loss.dual_clip = {lo.dual_clip}: goes with loss.surrogate = 'clip' alone, not with {lo.surrogate!r}; set it to 0",
    )
    need(
        0 <= c.overlong_buffer < r.max_response_tokens,
        f"overlong_buffer = {c.overlong_buffer}: must be 0 (off) or below rollout.max_response_tokens = "
        f"{r.max_response_tokens}",
    )
    need(c.max_resamples >= 0, f"max_resamples = {c.max_resamples}: must be 0 (off) or more")
    need(0 < r.top_p <= 1, f"rollout.top_p = {r.top_p}: must be in (0, 1]")
    need(r.top_k >= 0, f"rollout.top_k = {r.top_k}: must be 0 (off) or more")
    need(0 <= c.loss.clip_low < 1, f"loss.clip_low = {c.loss.clip_low}: must be in [0, 1)")
    need(c.loss.clip_high >= 0, f"loss.clip_high = {c.loss.clip_high}: must not be negative")
    need(
        r.max_result_tokens < r.max_response_tokens,
        f"rollout.max_result_tokens = {r.max_result_tokens} would fill the whole of "
        f"rollout.max_response_tokens = {r.max_response_tokens}",
    )
    need(
        c.policy.path is not None or c.policy.architecture is not None,
        "policy.path, policy.architecture: give one (a folder of weights, or the shape of a random start)",
    )
    need(
        c.policy.path is not None or c.policy.tokenizer is not None,
        "policy.tokenizer: needed when policy.path is not given",
    )
    need(
        c.data.source == "world" or c.data.path is not None,
        f"data.path: needed for data.source = {c.data.source!r} (the folder that holds its files; on the command line: --data DIR)",
    )
    mesh = c.mesh
    need(
        mesh.data % mesh.slices == 0,
        f"mesh.slices = {mesh.slices} does not divide mesh.data = {mesh.data}: slices split that axis",
    )
    per_prompt = ("rollout.num_initial", r.num_initial) if c.algorithm == "appo" else ("rollout.budget", r.budget)
    rows = c.prompts_per_minibatch * per_prompt[1]
    split = {f"prompts_per_minibatch × {per_prompt[0]}": rows, "optimizer.micro_batch": c.optimizer.micro_batch}
    if c.sft.steps:
        split |= {"sft.batch_size": c.sft.batch_size, "sft.micro_batch": c.sft.micro_batch}
    for name, value in split.items():
        need(
            value % (mesh.data * mesh.fsdp) == 0,
            f"{name} = {value} rows cannot be split over mesh.data × mesh.fsdp = {mesh.data * mesh.fsdp}",
        )
    micro = c.optimizer.micro_batch
    need(
        micro == 0 or rows % micro == 0,
        f"optimizer.micro_batch = {micro} does not divide a mini-batch of {rows} rollouts",
    )
    micro = c.sft.micro_batch
    need(
        micro == 0 or c.sft.batch_size % micro == 0,
        f"sft.micro_batch = {micro} does not divide sft.batch_size = {c.sft.batch_size}",
    )
    if problems:
        raise ConfigError.of(problems)
