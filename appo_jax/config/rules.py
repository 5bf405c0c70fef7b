"""Rules between fields. Those that depend on the algorithm are in `algorithms.broken`. Each function yields a sentence
for every rule that a config breaks: the fields, their values, what is expected, what to do. The bounds of a single
number are in its type, not here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import get_args

from appo_jax.config.bounds import temperature_problem
from appo_jax.config.data import DataConfig
from appo_jax.config.method import BranchingConfig, TurnRule
from appo_jax.config.policy import Architecture, RopeScaling, YarnScaling
from appo_jax.config.run import Config
from appo_jax.config.tools import PythonToolConfig, SearchToolConfig


def broken(config: Config, trains: bool = False) -> list[str]:
    """A sentence for every rule between fields that `config` breaks. `trains`: also for those that only training must keep."""
    return [problem for rules in (*_RULES, *([_training] if trains else [])) for problem in rules(config)]


def impossible(arch: Architecture) -> Iterator[str]:
    """A sentence for everything that no decoder of this shape can compute. The names of config.json stand in brackets."""
    if arch.num_heads % arch.num_kv_heads:
        yield (
            f"num_heads = {arch.num_heads} (num_attention_heads): must be a multiple of num_kv_heads = {arch.num_kv_heads} "
            "(num_key_value_heads)"
        )
    if arch.num_heads == arch.width:
        yield f"num_heads = {arch.num_heads}: must not equal width, because a transposed matrix is known by its first axis"
    if arch.head_dim % 2:
        yield f"head_dim = {arch.head_dim}: must be even, because pairs of channels are rotated"
    num_tokens = arch.vocab_size if arch.num_tokens is None else arch.num_tokens
    if num_tokens > arch.vocab_size:
        yield f"num_tokens = {num_tokens}: must not exceed vocab_size = {arch.vocab_size}, the rows of the embedding"
    if len(set(arch.missing_ids)) >= num_tokens:
        yield f"missing_ids holds {len(set(arch.missing_ids))} ids: a token must be left of num_tokens = {num_tokens}"
    scaling = arch.rope_scaling
    if isinstance(scaling, RopeScaling) and scaling.low_freq_factor >= scaling.high_freq_factor:
        yield (
            f"rope_scaling.low_freq_factor = {scaling.low_freq_factor}: must be below high_freq_factor = "
            f"{scaling.high_freq_factor}"
        )
    if isinstance(scaling, YarnScaling) and scaling.beta_slow >= scaling.beta_fast:
        yield f"rope_scaling.beta_slow = {scaling.beta_slow}: must be below beta_fast = {scaling.beta_fast}"


def _start(config: Config) -> Iterator[str]:
    policy = config.policy
    if policy.path is None and policy.architecture is None:
        yield "policy.path, policy.architecture: give one (a folder of weights, or the shape of a random start)"
    if policy.path is None and policy.tokenizer is None:
        yield "policy.tokenizer: needed when policy.path is not given"
    if policy.architecture is not None:
        yield from (f"policy.architecture.{problem}" for problem in impossible(policy.architecture))
    if policy.lora is not None and len(set(policy.lora.targets)) < len(policy.lora.targets):
        yield f"policy.lora.targets: a matrix is given twice ({', '.join(policy.lora.targets)}); give it once"


def _checkpoints(config: Config) -> Iterator[str]:
    every = config.eval.every
    if config.keep_best_checkpoints and (every == 0 or every % config.checkpoint_every):
        yield (
            f"keep_best_checkpoints = {config.keep_best_checkpoints}: needs eval.every (given: {every}) to be a multiple of "
            f"checkpoint_every = {config.checkpoint_every}: a step must be saved when it is evaluated"
        )


def _rollouts(config: Config) -> Iterator[str]:
    r = config.rollout
    if r.max_result_tokens >= r.max_response_tokens:
        yield (
            f"rollout.max_result_tokens = {r.max_result_tokens} would fill the whole of rollout.max_response_tokens = "
            f"{r.max_response_tokens}"
        )
    if config.reward.overlong_buffer >= r.max_response_tokens:
        yield (
            f"reward.overlong_buffer = {config.reward.overlong_buffer}: must be 0 (off) or below "
            f"rollout.max_response_tokens = {r.max_response_tokens}"
        )


def _reward(config: Config) -> Iterator[str]:
    reward = config.reward
    if reward.function == "judge" and reward.judge is None:
        yield "reward.judge: needed for reward.function = 'judge'; give --reward.judge.url and --reward.judge.model"
    names = [path.partition(":")[2] for path in reward.terms]
    if len(set(names)) < len(names):
        yield f"reward.terms: two functions are named alike ({', '.join(names)}); each needs its own name"
    if "overlong" in names:
        yield "reward.terms: a function is named overlong, as the part that reward.overlong_buffer adds; give it another name"


def _data(config: Config) -> Iterator[str]:
    data = config.data
    if data.mixture and data.source != "mixture":
        yield (
            f"data.mixture: only data.source = 'mixture' uses it, not {data.source!r}; set data.source = 'mixture', or leave out "
            "the mixture"
        )
    for name in ("path", "held_out", "kind", "columns") if data.source == "mixture" else ():
        given, default = getattr(data, name), getattr(DataConfig(), name)
        if given != default:
            yield (
                f"data.{name} = {given!r}: data.source = 'mixture' does not use it, because each part of data.mixture has its "
                f"own; set it there, and data.{name} to {default!r}"
            )


def _tools(config: Config) -> Iterator[str]:
    search = config.tools.search
    if search.cache_fill is not None and search.cache is None:
        yield (
            f"tools.search.cache_fill = {search.cache_fill!r}: its answers are put into tools.search.cache, which is not given; "
            "name a file for it"
        )
    if search.corpus is not None and search.url is not None:
        yield (
            f"tools.search.corpus = {search.corpus!r} and tools.search.url = {search.url!r}: a search asks a local index or a "
            "server; give one"
        )
    if search.cache_fill is not None and search.corpus is not None:
        yield (
            f"tools.search.cache_fill = {search.cache_fill!r}: tools.search.corpus = {search.corpus!r} answers every search, so "
            "the answers in it would never be found; give one"
        )
    for name in ("provider", "max_per_second", "timeout", "max_retries") if search.url is None else ():
        given, default = getattr(search, name), getattr(SearchToolConfig(), name)
        if given != default:
            yield (
                f"tools.search.{name} = {given!r}: only a search at tools.search.url uses it, and no url is given; give one, or "
                f"set it to {default!r}"
            )
    python = config.tools.python
    for name in ("memory_mb", "modules") if python.isolation == "remote" else ():
        given, default = getattr(python, name), getattr(PythonToolConfig(), name)
        if given != default:
            yield (
                f"tools.python.{name} = {given!r}: isolation = 'remote' does not use it, because the server decides; set it to "
                f"{default!r}"
            )
    if python.url is not None and python.isolation != "remote":
        yield (
            f"tools.python.url = {python.url!r}: only isolation = 'remote' uses it, not {python.isolation!r}; set "
            "tools.python.isolation = 'remote', or leave out the url"
        )
    if len(set(config.tools.enabled)) < len(config.tools.enabled):
        yield f"tools.enabled: a tool is given twice ({', '.join(config.tools.enabled)}); give it once"


def _evaluation(config: Config) -> Iterator[str]:
    sets = config.eval.sets
    names = [chosen.set for chosen in sets]
    if len(set(names)) < len(names):
        yield f"eval.sets: a set is given twice ({', '.join(names)}), and its figures would overwrite each other; give it once"
    for chosen in sets:
        yield from temperature_problem(f"eval.sets: temperature of {chosen.set} =", chosen.temperature)
        if chosen.samples > 1 and chosen.temperature == 0:
            yield (
                f"eval.sets: {chosen.set} has samples = {chosen.samples} at temperature = 0, where all samples are the same; "
                "set a temperature above 0, or samples = 1"
            )


def _branching(config: Config) -> Iterator[str]:
    b = config.branching
    if b.clip_low >= b.clip_high:
        yield f"branching.clip_low = {b.clip_low} must be below branching.clip_high = {b.clip_high}"
    if b.score == "additive" and b.entropy_weight == b.future_weight == 0:
        yield (
            "branching.entropy_weight = 0 and branching.future_weight = 0: with branching.score = 'additive' every position would "
            "have the score 0; raise one of them"
        )
    for name in ("allocation", "include_token", "min_spacing", "skip_blank") if b.score in get_args(TurnRule) else ():
        given, default = getattr(b, name), getattr(BranchingConfig(), name)
        if given != default:
            yield (
                f"branching.{name} = {given!r}: branching.score = {b.score!r} does not use it, because it branches where a turn "
                f"begins; set it to {default!r}"
            )


def _objective(config: Config) -> Iterator[str]:
    a, lo = config.advantage, config.loss
    if a.clip_low > a.clip_high:
        yield f"advantage.clip_low = {a.clip_low} exceeds advantage.clip_high = {a.clip_high}"
    if a.scaling == "plain" and a.clip_high == 0:
        yield (
            "advantage.clip_high = 0: with advantage.scaling = 'plain' every advantage would be multiplied by 0 and nothing would "
            "be learnt; raise it"
        )
    if a.base == "global" and config.prompts_per_minibatch * config.rollout.budget == 1:
        yield (
            "prompts_per_minibatch = 1 and rollout.budget = 1: with advantage.base = 'global' no mini-batch has two rollouts, so "
            "every advantage would be 0 and nothing would be learnt; raise one of them"
        )
    for name, value in {"loss.dual_clip": lo.dual_clip, "advantage.max_ratio": a.max_ratio}.items():
        if 0 < value <= 1:
            yield f"{name} = {value}: must be above 1, or 0 (off)"
    if lo.max_k3 > 0 and lo.kl_estimator != "k3":
        yield f"loss.max_k3 = {lo.max_k3}: bounds loss.kl_estimator = 'k3' alone, not {lo.kl_estimator!r}; set it to 0"
    if lo.max_dual_clipped >= 0 and lo.dual_clip == 0:
        yield (
            f"loss.max_dual_clipped = {lo.max_dual_clipped} counts dual-clipped tokens: set loss.dual_clip too "
            "(official: 3)"
        )
    if lo.surrogate != "clip" and lo.dual_clip > 0:
        yield (
            f"loss.dual_clip = {lo.dual_clip}: goes with loss.surrogate = 'clip' alone, not with {lo.surrogate!r}; set it "
            "to 0"
        )


def _batches(config: Config) -> Iterator[str]:
    """Mini-batches are full, and every batch splits evenly over micro-batches and devices."""
    c, mesh, sft = config, config.mesh, config.sft
    if c.prompts_per_step % c.prompts_per_minibatch:
        yield (
            f"prompts_per_step = {c.prompts_per_step} is not a multiple of prompts_per_minibatch = "
            f"{c.prompts_per_minibatch}: every mini-batch must be full"
        )
    if mesh.data % mesh.slices:
        yield f"mesh.slices = {mesh.slices} does not divide mesh.data = {mesh.data}: the data axis is split over the slices"
    if sft.steps:
        for name, value in {"sft.batch_size": sft.batch_size, "sft.micro_batch": sft.micro_batch}.items():
            if value % (mesh.data * mesh.fsdp):
                yield f"{name} = {value} rows cannot be split over mesh.data × mesh.fsdp = {mesh.data * mesh.fsdp}"
    micro = c.optimizer.micro_batch
    if micro % (mesh.data * mesh.fsdp):
        yield (
            f"optimizer.micro_batch = {micro} rows cannot be split over mesh.data × mesh.fsdp = {mesh.data * mesh.fsdp}"
        )
    if sft.micro_batch and sft.batch_size % sft.micro_batch:
        yield f"sft.micro_batch = {sft.micro_batch} does not divide sft.batch_size = {sft.batch_size}"


def _training(config: Config) -> Iterator[str]:
    """Rules that only training must keep: `data describe`, for one, uses `data.evaluation` whatever `data.drop` is."""
    data = config.data
    if data.evaluation and "overlaps" not in data.drop:
        yield (
            f"data.evaluation = {list(data.evaluation)!r}: its questions would stay in training, because data.drop = "
            f"{list(data.drop)!r} leaves out no overlaps; add 'overlaps' to data.drop, or leave data.evaluation out"
        )
    if config.rollout.top_k == 1 and config.advantage.base != "global":
        yield (
            "rollout.top_k = 1: every draw would be the likeliest token, so all rollouts of a prompt would be the same and nothing "
            "would be learnt; raise it, or set it to 0 (off)"
        )


_RULES: tuple[Callable[[Config], Iterator[str]], ...] = (
    _start,
    _checkpoints,
    _rollouts,
    _reward,
    _data,
    _evaluation,
    _tools,
    _branching,
    _objective,
    _batches,
)
