"""Measures the sampler against its peers and against the machine's limits: `make bench` (needs the `bench` extra).

    python benchmarks/sampler.py [--policy artifacts/smollm2] [--repeats 5]
    python benchmarks/sampler.py --lengths 352 256  # only our rates, at the lengths of an evaluation or a run of yours

All samplers run in one process, on the same weights, prompts and lengths; figures are medians over repeats. They are written to
benchmarks/results/sampler.json and sampler.md, and benchmarks/RESULTS.md explains them. `appo-jax convert smollm2 --out
artifacts/smollm2` makes the policy folder. Run nothing else on the machine at the same time.

Decode rates leave the prefill out for every sampler: the time of 1 new token is subtracted from the time of 64. Rates named
`whole_` are those of whole generations, prefill included. Every row has its own prompt, except in figures named `groups`, in
which eight rows share a prompt; the rates of the peers do not depend on this.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from appo_jax.config import Architecture, BranchingConfig, RolloutConfig, ToolsConfig
from appo_jax.policy import weights
from appo_jax.policy.architecture import read_architecture
from appo_jax.policy.packing import pack
from appo_jax.policy.score import score
from appo_jax.policy.sharding import GeneratingPolicy, generating
from appo_jax.rollout import decode, state
from appo_jax.rollout.engine import Draw, Engine
from appo_jax.rollout.prefixes import Prefix
from appo_jax.rollout.rows import Fork
from appo_jax.rollout.seating import Seating
from appo_jax.rollout.shapes import Shapes
from appo_jax.text.tokenizer import JsonTokenizer, load_tokenizer
from appo_jax.tools.executor import ToolExecutor
from appo_jax.tools.format import Call
from appo_jax.tools.protocol import ToolResult
from appo_jax.types import Example, Outcome, Rollout

RESULTS = Path(__file__).parent
PROMPT, NEW = 128, 64  # tokens of a prompt, and new tokens
EXAMPLE = Example("benchmark", "", ("",), "qa", "")


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of `run`."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Median wall time of `run` in seconds, after a first run that compiles."""
    run()
    return statistics.median(seconds(run) for _ in range(repeats))


def shapes_of(engine: Engine) -> Shapes:
    return Shapes(engine.config, BranchingConfig())


Continue = Callable[[int], Any]  # continues the prompts of a batch by this number of new tokens


def rates(
    samplers: dict[str, Continue], batch: int, repeats: int, new: int = NEW
) -> tuple[dict[str, float], dict[str, float]]:
    """New tokens per second of each sampler on `batch` rows: (decoding alone, prefill included). A first round compiles.

    The samplers run in turns, and each alternates between `new` new tokens and 1, so that a change of the machine's speed affects
    all of them equally.
    """
    decoding: dict[str, list[float]] = {name: [] for name in samplers}
    with_prefill: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(repeats + 1):
        for name, run in samplers.items():
            with_prefill[name].append(seconds(functools.partial(run, new)))
            decoding[name].append(with_prefill[name][-1] - seconds(functools.partial(run, 1)))

    def per_second(tokens: int, times_of: dict[str, list[float]]) -> dict[str, float]:
        return {name: tokens / statistics.median(times[1:]) for name, times in times_of.items()}

    return per_second(batch * (new - 1), decoding), per_second(batch * new, with_prefill)


# ---- the machine


def matmul_flops(repeats: int) -> float:
    """FLOP/s of a float32 product of two 2048 × 2048 matrices: an upper limit for programs that consist of matrix products."""
    x = jnp.ones((2048, 2048), jnp.float32)
    product = jax.jit(jnp.dot)
    return 2 * 2048**3 / median_seconds(lambda: product(x, x).block_until_ready(), 4 * repeats)


def memory_rate(repeats: int) -> float:
    """Bytes per second that a sum over 1 GiB reads. The CPU's caches hold much less."""
    x = jnp.ones(2**28, jnp.float32)
    total = jax.jit(jnp.sum)
    return x.nbytes / median_seconds(lambda: total(x).block_until_ready(), repeats)


def flops_per_token(arch: Architecture) -> int:
    """FLOPs of one token's matrix products with weights: two per multiply-add. Attention is not counted."""
    heads = arch.head_dim * (2 * arch.num_heads + 2 * arch.num_kv_heads)
    return 2 * (arch.num_layers * arch.width * (heads + 3 * arch.mlp_width) + arch.vocab_size * arch.width)


# ---- this sampler


class OnString:
    """A call format in which any occurrence of `string` is a call, so that a policy makes calls without training."""

    def __init__(self, string: str):
        self.string = string

    tools = ()

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.string,)

    def parse(self, text: str) -> Call | str:
        return Call("pause", str(len(text)))

    result_marks = ("", "")


class Pause:
    """A tool whose calls take `seconds`."""

    name = "pause"

    def __init__(self, seconds: float):
        self.seconds = seconds

    def start(self) -> None:
        return None

    def call(self, state: None, argument: str) -> tuple[ToolResult, None]:
        time.sleep(self.seconds)
        return ToolResult(" ok", Outcome.OK), None

    def close(self) -> None:
        pass


class Bench:
    """The policy in `folder`, and engines of any shape for it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.arch = read_architecture(folder)
        self.params = weights.load(folder, dtype=jnp.float32)
        tokenizer = load_tokenizer(str(folder))
        assert isinstance(tokenizer, JsonTokenizer)
        tokenizer.eos_ids = (-1,)  # no token ends a rollout, so each has its full length
        self.tokenizer = tokenizer

    def engine(self, string: str = "\0never\0", pause: float = 0.0, **config: Any) -> Engine:
        """An engine in which `string` calls a tool of `pause` seconds. `config`: fields of RolloutConfig."""
        rollout = RolloutConfig(max_result_tokens=8, max_tool_calls=10**6, max_seconds=1e6, **config)
        executor = ToolExecutor([Pause(pause)], ToolsConfig(max_concurrency=64), OnString(string))
        return Engine(self.arch, self.tokenizer, executor, rollout, seed=0, dtype=jnp.float32)

    def policy(self, engine: Engine) -> GeneratingPolicy:
        return generating(self.params, engine.mesh, engine.dtype)

    def prompts(self, count: int, length: int, seed: int = 0) -> list[np.ndarray]:
        """`count` random prompts, `[length]` int32 each."""
        rng = np.random.default_rng(seed)
        return [row.astype(np.int32) for row in rng.integers(100, self.arch.vocab_size, (count, length))]

    def fork(self, tokens: np.ndarray, node: int, prompt_length: int) -> Fork:
        """A rollout that continues `tokens`."""
        zeros = np.zeros(len(tokens), np.float32)
        return Fork(EXAMPLE, tokens, prompt_length, zeros > 0, zeros, zeros, (), {}, node)

    def generate(
        self, engine: Engine, prompts: Sequence[np.ndarray], new: Sequence[int], copies: int = 1
    ) -> list[Rollout]:
        """Prefill the prompts, and continue each by its number of new tokens, `copies` times."""
        # A rollout ends `max_new` tokens after its prompt. If the prompt is said to end earlier, `count` new tokens are left.
        max_new = engine.config.max_response_tokens
        forks = [
            [self.fork(tokens, node, len(tokens) - (max_new - count)) for node in range(copies)]
            for tokens, count in zip(prompts, new, strict=True)
        ]
        policy, shapes = self.policy(engine), shapes_of(engine)
        length, rows = engine.config.max_prompt_tokens, shapes.prefill_rows(len(prompts))
        caches = engine.prefill(policy, prompts, length, rows)
        groups = engine.generate(policy, forks, caches, shapes.initial(len(forks), copies), Draw((0,), 1.0))
        return [rollout for rows in groups for rollout in rows]


def ours(bench: Bench, batch: int, copies: int = 1, prompt: int = PROMPT, new: int = NEW) -> Continue:
    """Our sampler, which also returns log-probs and entropies. `copies`: rows of each prompt."""
    engine = bench.engine(max_prompt_tokens=prompt, max_response_tokens=new, decode_rows=batch)
    prompts = bench.prompts(batch // copies, prompt)
    return lambda count: bench.generate(engine, prompts, [count] * len(prompts), copies)


def ours_groups(bench: Bench, batch: int) -> Continue:
    """Our sampler with eight rows of each prompt, like the rollouts of a group."""
    return ours(bench, batch, copies=8)


def branching(bench: Bench, repeats: int) -> dict[str, float]:
    """Branching with 16 parents of 512 tokens: 3 branches of each from the middle, with 64 new tokens.

    `branch_speedup`: the time without shared prefixes over that with them. `score_overhead`: the time of a score pass and of
    branching over that of the score pass and of decoding alone.
    """
    parents, columns, length, middle = 16, 3, 512, 256
    prompts = bench.prompts(parents, length)
    forks = [[bench.fork(tokens[:middle], node, middle) for node in range(columns)] for tokens in prompts]
    config = {"max_prompt_tokens": middle, "max_response_tokens": NEW, "decode_rows": parents * columns}
    shared, unshared = (bench.engine(share_prefix=share, **config) for share in (True, False))
    packing = pack(prompts, length)  # each prompt fills one row
    score_pass = functools.partial(
        score, bench.params, packing.rows, arch=bench.arch, temperature=1.0, dtype=jnp.float32
    )
    cache = score_pass().cache

    def prefixes_of(cache: list) -> Iterator[Prefix]:
        return (Prefix(cache, int(row), np.arange(length, dtype=np.int32)) for row in packing.row)

    def branch(engine: Engine, cache: list) -> list:
        shapes = shapes_of(engine).generation(parents, columns, length)
        return engine.generate(bench.policy(engine), forks, prefixes_of(cache), shapes, Draw((0,), 1.0))

    shared_s = median_seconds(lambda: branch(shared, cache), repeats)
    unshared_s = median_seconds(lambda: branch(unshared, cache), repeats)

    # Decoding alone: the same rows on loaded prefixes, without work of the host between steps.
    shapes = shapes_of(shared).generation(parents, columns, length)
    seating = Seating([(g, group) for g, group in enumerate(forks)], shapes)
    opened, seated = seating.seat()
    policy = bench.policy(shared)
    prefixes = state.empty_prefixes(bench.arch, seating.num_slots, length, jnp.float32)
    for slot, index in opened:
        prefixes = state.load_prefix(prefixes, *list(prefixes_of(cache))[index], slot)
    new = state.NewRows.none(seating.num_rows, 2)
    for w, _, fork in seated:
        new.on[w], new.last_token[w], new.start[w], new.limit[w] = True, fork.tokens[-1], middle - 1, NEW + 1

    def decode_alone() -> None:
        rows = state.empty_state(bench.arch, seating.num_rows, NEW + 1, jnp.float32)
        rows = state.begin_rows(rows, new, 0)
        until = decode.Until(0, NEW)
        seats = state.Prefixes(prefixes, seating.places())
        rows, _ = decode.decode_segment(policy.step, seats, rows, shared.stop_tables, until, spec=shared.spec(1.0))
        rows.length.block_until_ready()

    score_and_branch_s = median_seconds(lambda: branch(shared, score_pass().cache), repeats)

    def score_and_decode() -> None:
        score_pass().log_probs.block_until_ready()
        decode_alone()

    return {
        "branch_speedup": unshared_s / shared_s,
        "score_overhead": score_and_branch_s / median_seconds(score_and_decode, repeats),
    }


def useful_rows(bench: Bench, rollouts: int) -> float:
    """The share of row-steps that sampled a token, for `rollouts` rollouts of 38 tokens on average, at most 256, on 64 rows.

    A row is idle only at the end, when no rollout waits any more, so the share depends on the number of rollouts per row.
    """
    rng = np.random.default_rng(1)
    lengths = np.clip(rng.lognormal(3.3, 0.9, rollouts), 4, 256).astype(int)
    engine = bench.engine(max_prompt_tokens=8, max_response_tokens=256, decode_rows=64)
    bench.generate(engine, bench.prompts(rollouts, 8), lengths.tolist())
    stats = engine.take_stats()
    assert stats.sampled_tokens == lengths.sum()
    return stats.sampled_tokens / stats.row_steps


def tool_overlap(bench: Bench, repeats: int) -> dict[str, float]:
    """`tool_overlap`: sampled tokens per second if a third of 192 rollouts call a tool of one second, over the rate without
    calls. `tool_calling_rows`: the share of rollouts that make a call."""
    config = {"max_prompt_tokens": 32, "max_response_tokens": NEW, "decode_rows": 64}
    prompts, new = bench.prompts(192, 32, seed=2), [NEW] * 192
    plain = bench.engine(**config)
    texts = [bench.tokenizer.decode(r.tokens[32:].tolist()) for r in bench.generate(plain, prompts, new)]
    # The call is a word that about a third of these rollouts contain. They are drawn again, and are the same up to this word.
    words = Counter(word for text in texts for word in set(text.split()) if word.isalpha() and len(word) > 2)
    call_word = min(words, key=lambda word: abs(sum(f" {word}" in text for text in texts) - 64))
    engine = bench.engine(string=f" {call_word}", pause=1.0, **config)

    def rate(engine: Engine) -> tuple[float, float]:
        rates, calling = [], 0.0
        for _ in range(repeats):
            engine.take_stats()
            began = time.perf_counter()
            rollouts = bench.generate(engine, prompts, new)
            rates.append(engine.take_stats().sampled_tokens / (time.perf_counter() - began))
            calling = float(np.mean([len(r.calls) > 0 for r in rollouts]))
        return statistics.median(rates), calling

    rate(engine)  # compiles
    (with_tools, calling), (without, _) = rate(engine), rate(plain)
    return {"tool_overlap": with_tools / without, "tool_calling_rows": calling}


# ---- peers


def tunix(bench: Bench, batch: int) -> Continue:
    """tunix's vanilla sampler with the policy from the same folder. It computes no log-probs."""
    from tunix.generate.sampler import CacheConfig, Sampler
    from tunix.models.llama3 import model, params

    a = bench.arch
    config = model.ModelConfig(
        num_layers=a.num_layers, vocab_size=a.vocab_size, embed_dim=a.width, hidden_dim=a.mlp_width,
        num_heads=a.num_heads, head_dim=a.head_dim, num_kv_heads=a.num_kv_heads, rope_theta=int(a.rope_theta),
        norm_eps=a.norm_eps, weight_tying=a.tie_embeddings,
    )  # fmt: skip
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with mesh:
        decoder = params.create_model_from_safe_tensors(str(bench.folder), config, mesh, dtype=jnp.float32)

        class Ids:
            """A tokenizer whose texts are token ids, written as numbers."""

            def encode(self, text: str, **_: Any) -> list[int]:
                return [int(word) for word in text.split()]

            def decode(self, ids: Sequence[int], **_: Any) -> str:
                return " ".join(map(str, ids))

            def bos_id(self) -> int:
                return 1

            def eos_id(self) -> int:
                return 2

            def pad_id(self) -> int:
                return 2

        cache = CacheConfig(PROMPT + NEW, a.num_layers, a.num_kv_heads, a.head_dim)
        sampler = Sampler(decoder, Ids(), cache)
        texts = [" ".join(map(str, row[1:])) for row in bench.prompts(batch, PROMPT)]

    def run(new: int) -> None:
        with mesh:
            out = sampler(
                texts, new, max_prompt_length=PROMPT, temperature=1.0, top_p=1.0, eos_tokens=[a.vocab_size + 1],
                seed=0,
            )  # fmt: skip
        assert all(len(row) == new for row in out.tokens)

    return run


def transformers(bench: Bench, batch: int) -> Continue:
    """transformers' `generate` with the policy from the same folder."""
    import torch
    from transformers import AutoModelForCausalLM

    decoder = AutoModelForCausalLM.from_pretrained(bench.folder, dtype=torch.float32)
    ids = torch.tensor(np.stack(bench.prompts(batch, PROMPT)), dtype=torch.long)

    def run(new: int) -> None:
        with torch.inference_mode():
            out = decoder.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=new, min_new_tokens=new, pad_token_id=0,
            )  # fmt: skip
        assert out.shape == (batch, PROMPT + new)

    return run


# ---- the report

TARGETS = {
    "ratio_tunix_b64": (2.5, ">="), "ratio_transformers_b64": (3.0, ">="), "fraction_of_matmul_limit_b64": (0.45, ">="),
    "ratio_tunix_b16": (1.7, ">="), "branch_speedup": (3.0, ">="), "score_overhead": (1.15, "<="),
    "useful_rows": (0.8, ">="), "tool_overlap": (0.7, ">="),
}  # fmt: skip


def machine() -> dict[str, Any]:
    """CPU, number of cores and version of jax."""
    model = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {"cpu": model[0] if model else platform.processor(), "cores": os.cpu_count(), "jax": jax.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--policy", type=Path, default=Path("artifacts/smollm2"), help="folder of the policy")
    parser.add_argument("--repeats", type=int, default=5, help="repeats of each measurement")
    parser.add_argument("--only-ours", action="store_true", help="measure only our sampler, and write no files")
    parser.add_argument(
        "--lengths", type=int, nargs=2, metavar=("PROMPT", "NEW"),
        help="measure only the rates of our sampler, at these numbers of tokens, and write no files",
    )  # fmt: skip
    options = parser.parse_args()
    bench, figures = Bench(options.policy), dict[str, float]()

    def add(**new: float) -> None:
        """Print new figures and keep them."""
        figures.update(new)
        for name, value in new.items():
            target = TARGETS.get(name)
            print(f"{name:34} {value:12.4g}" + (f"   (target {target[1]} {target[0]})" if target else ""), flush=True)

    add(matmul_gflops=matmul_flops(options.repeats) / 1e9, memory_gb_per_s=memory_rate(options.repeats) / 1e9)
    limit = 1e9 * figures["matmul_gflops"] / flops_per_token(bench.arch)
    add(matmul_limit_tokens_per_s=limit)
    if options.lengths:
        prompt, new = options.lengths
        decoding, with_prefill = rates({"ours": ours(bench, 64, 1, prompt, new)}, 64, options.repeats, new)
        add(ours_b64=decoding["ours"], whole_ours_b64=with_prefill["ours"])
        return
    peers = {} if options.only_ours else {64: (tunix, transformers), 16: (tunix,)}
    for batch in (64, 16):
        others = peers.get(batch, ())
        samplers = {sampler.__name__: sampler(bench, batch) for sampler in (ours, ours_groups, *others)}
        decoding, with_prefill = rates(samplers, batch, options.repeats)
        for kind, rate in (("", decoding), ("whole_", with_prefill)):
            add(**{f"{kind}{name}_b{batch}": value for name, value in rate.items()})
            for peer in (other.__name__ for other in others):
                for groups in ("", "_groups"):
                    add(**{f"{kind}ratio_{peer}{groups}_b{batch}": rate[f"ours{groups}"] / rate[peer]})
    add(fraction_of_matmul_limit_b64=figures["ours_b64"] / limit)
    add(**branching(bench, options.repeats))
    add(**tool_overlap(bench, options.repeats))
    add(useful_rows=useful_rows(bench, 2048), useful_rows_of_256=useful_rows(bench, 256))
    if options.only_ours:
        return

    record = {"machine": machine(), "policy": dataclasses.asdict(bench.arch), "repeats": options.repeats} | figures
    (RESULTS / "results" / "sampler.json").write_text(json.dumps(record, indent=2) + "\n")
    rows = [
        f"| {name} | {value:.4g} | {' '.join(map(str, reversed(TARGETS[name]))) if name in TARGETS else ''} |"
        for name, value in figures.items()
    ]
    (RESULTS / "results" / "sampler.md").write_text(
        "# The sampler, measured\n\n`make bench` on "
        f"{machine()['cpu']}, {machine()['cores']} cores, float32, SmolLM2-135M, prompt {PROMPT}, {NEW} new tokens, "
        f"medians of {options.repeats}. Rates are new tokens per second; benchmarks/sampler.py defines the figures.\n\n"
        "| figure | value | target |\n|---|---|---|\n" + "\n".join(rows) + "\n"
    )


if __name__ == "__main__":
    main()
