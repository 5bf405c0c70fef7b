"""Measures whole RL steps against peers, and the update against the machine: `make bench DATA=DIR` (needs the `bench` extra).

    python benchmarks/step.py --data DIR_OF_GSM8K [--repeats 3]

The policy has SmolLM2's shape and random weights in float32. The prompts are GSM8K's questions, with one token for each word or
sign; there are no tools. The peers, tunix's GRPOLearner and TRL's GRPOTrainer, get the same weights, prompts, group size and number
of new tokens. Every rollout has its full length. Figures are medians over repeats, after a first step that compiles. They are
written to benchmarks/results/step.json. Run nothing else on the machine at the same time.

Sampling, scoring and update are timed separately. Scoring is the additional computation of log-probs: our library scores all
rollouts once for log π_old (appo: once more before branching); the peers make one update per step and take π_old = π_θ in it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import re
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sampler import OnString, flops_per_token, machine, matmul_flops

from appo_jax.algorithms import make_algorithm
from appo_jax.components import Components
from appo_jax.config import (
    Architecture,
    BranchingConfig,
    Config,
    OptimizerConfig,
    PolicyConfig,
    RolloutConfig,
    ToolsConfig,
)
from appo_jax.learner.batch import make_batch
from appo_jax.learner.loss import Terms
from appo_jax.learner.optimizer import rl_optimizer
from appo_jax.learner.step import StepSpec, TrainState, make_train_step
from appo_jax.policy import weights
from appo_jax.policy.parameters import Params, init_params
from appo_jax.reward import Judge
from appo_jax.rollout.engine import Engine
from appo_jax.rollout.shapes import PackedShape, Shapes
from appo_jax.rollout.tree_sampler import TreeSampler
from appo_jax.tools.executor import ToolExecutor
from appo_jax.train import begin
from appo_jax.train_step import train_step
from appo_jax.types import Example, RewardResult

ARCH = Architecture(49152, 576, 30, 9, 3, 64, 1536, rope_theta=100000.0, tie_embeddings=True)
PROMPTS, GROUP, MAX_PROMPT, NEW = 2, 8, 128, 64
RATE = 1e-6  # learning rate
RESULT = Path(__file__).parent / "results" / "step.json"
Times = dict[str, float]  # seconds of the phases of a step (sampling, scoring, update) and of the whole (step)


def words(text: str) -> list[int]:
    """The token ids of a text: one token for each word or sign."""
    return [100 + zlib.crc32(word.encode()) % (ARCH.vocab_size - 100) for word in re.findall(r"\w+|\S", text)]


def gsm8k(folder: Path) -> list[tuple[list[int], int]]:
    """The token ids of questions of at most MAX_PROMPT tokens, and the lengths of their solutions in tokens."""
    records = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()[:500]]
    found = [(words(r["question"]), len(words(r["answer"]))) for r in records]
    return [(tokens, length) for tokens, length in found if len(tokens) <= MAX_PROMPT]


def reward(ids: Sequence[int]) -> float:
    """The reward of a response. It means nothing; it only must differ between rollouts."""
    return float(sum(ids) % 2)


class Numbers:
    """A tokenizer whose texts are token ids, written as numbers."""

    vocab_size, eos_id, eos_ids, pad_id = ARCH.vocab_size, 0, (-1,), 0  # no token ends a rollout

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(word) if word.isdigit() else 1 for word in text.split()]

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "".join(f" {i}" for i in ids)

    def token_bytes(self) -> list[bytes]:
        return [f" {i}".encode() for i in range(self.vocab_size)]

    def render_prompt(self, system: str, question: str) -> list[int]:
        return self.encode(question)


# ---- this library


def config_of(algorithm: str) -> Config:
    """The config of our runs."""
    return Config(
        algorithm=algorithm, prompts_per_step=PROMPTS, prompts_per_minibatch=PROMPTS,
        policy=PolicyConfig(architecture=ARCH, tokenizer="x", compute_dtype="float32"),
        rollout=RolloutConfig(
            num_initial=GROUP // 2, budget=GROUP, max_prompt_tokens=MAX_PROMPT, max_response_tokens=NEW, max_result_tokens=8,
            max_tool_calls=1, decode_rows=PROMPTS * GROUP, max_seconds=1e6,
        ),
        branching=BranchingConfig(num_branch_points=1), optimizer=OptimizerConfig(learning_rate=RATE),
    )  # fmt: skip


def ours(algorithm: str, params: Params, prompts: Sequence[list[int]]) -> Callable[[], Times]:
    """A function that makes one step of our library and returns its times."""
    config = config_of(algorithm)
    executor = ToolExecutor([], ToolsConfig(enabled=()), OnString("\0never\0"))
    engine = Engine(ARCH, Numbers(), executor, config.rollout, 0, jnp.float32)
    sampler = TreeSampler(engine, config.branching)
    judge = Judge("parity", lambda response: RewardResult(reward(Numbers().encode(response.text)), False))
    no_data: Any = None
    components = Components(
        config, no_data, (), (), Numbers(), executor, ARCH, jnp.dtype("float32"), engine.mesh, sampler, judge,
        contextlib.ExitStack(),
    )  # fmt: skip
    examples = [Example(f"q{i}", Numbers().decode(p), ("",), "math", "") for i, p in enumerate(prompts)]
    trainer, state = begin(components, jax.tree.map(jnp.copy, params))

    def step() -> Times:
        nonlocal state
        state, record, trees = train_step(trainer, 0, state, examples, itertools.repeat(examples))
        assert all(len(tree) == GROUP for tree in trees)
        times = {name: record.get(f"time/{name}_s", 0.0) for name in ("rollout", "branch", "score", "update", "step")}
        return {
            "sampling": times["rollout"] + times["branch"], "scoring": times["score"], "update": times["update"],
            "step": times["step"],
        }  # fmt: skip

    return step


# ---- peers


class Clock:
    """Measures the phases of the steps of another library, by wrapping its methods."""

    def __init__(self) -> None:
        self.steps: list[Times] = []
        self._phases: Times = {}
        self._began = time.perf_counter()

    def watch(self, owner: Any, method: str, name: str) -> None:
        """Count the time of a method's calls as phase `name`."""
        run = getattr(owner, method)

        def watched(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            out = run(*args, **kwargs)
            self._phases[name] = self._phases.get(name, 0.0) + time.perf_counter() - began
            return out

        setattr(owner, method, watched)

    def begin(self) -> None:
        """A step begins."""
        self._began, self._phases = time.perf_counter(), {}

    def end(self) -> None:
        """A step ends. Its time outside of the other phases is the update."""
        step_s = time.perf_counter() - self._began
        phases = {"sampling": 0.0, "scoring": 0.0} | self._phases
        self.steps.append(phases | {"update": step_s - sum(phases.values()), "step": step_s})
        self.begin()


def tunix(folder: Path, prompts: Sequence[list[int]], repeats: int) -> list[Times]:
    """The times of steps of tunix's GRPOLearner with tunix's sampler."""
    import optax
    from flax import nnx
    from tunix.models.llama3 import model
    from tunix.models.llama3 import params as loader
    from tunix.rl import rl_cluster
    from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
    from tunix.rl.rollout.base_rollout import RolloutConfig as Rollouts

    class Ids(Numbers):
        def bos_id(self) -> int:
            return 1

        def eos_id(self) -> int:
            return 2

        def pad_id(self) -> int:
            return 0

    shape = model.ModelConfig(
        num_layers=ARCH.num_layers, vocab_size=ARCH.vocab_size, embed_dim=ARCH.width, hidden_dim=ARCH.mlp_width,
        num_heads=ARCH.num_heads, head_dim=ARCH.head_dim, num_kv_heads=ARCH.num_kv_heads, rope_theta=int(ARCH.rope_theta),
        norm_eps=ARCH.norm_eps, weight_tying=ARCH.tie_embeddings,
    )  # fmt: skip
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    clock, role = Clock(), rl_cluster.Role

    def rewards(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
        return [reward(Numbers().encode(text)) for text in completions]

    with mesh:
        cluster = rl_cluster.RLCluster(
            actor=loader.create_model_from_safe_tensors(str(folder), shape, mesh, dtype=jnp.float32), tokenizer=Ids(),
            cluster_config=rl_cluster.ClusterConfig(
                role_to_mesh=dict.fromkeys((role.ACTOR, role.REFERENCE, role.ROLLOUT), mesh),
                training_config=rl_cluster.RLTrainingConfig(
                    eval_every_n_steps=10**6, max_steps=repeats + 1, actor_optimizer=optax.adamw(RATE),
                    mini_batch_size=PROMPTS, train_micro_batch_size=PROMPTS,
                ),
                rollout_config=Rollouts(
                    max_tokens_to_generate=NEW, max_prompt_length=MAX_PROMPT, kv_cache_size=MAX_PROMPT + NEW,
                    temperature=1.0, top_p=1.0, eos_tokens=[ARCH.vocab_size + 1],
                ),
            ),
        )  # fmt: skip
        learner = GRPOLearner(cluster, GRPOConfig(num_generations=GROUP, num_iterations=1, beta=0.0), rewards)
        clock.watch(cluster, "generate", "sampling")
        update = cluster.update_actor

        def update_and_wait(*args: Any, **kwargs: Any) -> Any:
            out = update(*args, **kwargs)
            jax.block_until_ready(jax.tree.leaves(nnx.state(cluster.actor_trainer.model)))
            clock.end()
            return out

        cluster.update_actor = update_and_wait
        clock.begin()
        texts = np.array([" ".join(map(str, tokens)) for tokens in prompts])
        learner.train([{"prompts": texts} for _ in range(repeats + 1)])
    return clock.steps


def trl(folder: Path, prompts: Sequence[list[int]], repeats: int) -> list[Times]:
    """The times of steps of TRL's GRPOTrainer, which samples with transformers."""
    import datasets
    import tokenizers
    import transformers
    from trl import GRPOConfig, GRPOTrainer

    ids = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(ARCH.vocab_size)}, unk_token="1"))
    ids.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    clock = Clock()

    class Steps(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end()

    def rewards(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [reward(ids) for ids in completion_ids]

    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            output_dir=out, per_device_train_batch_size=PROMPTS * GROUP, num_generations=GROUP, max_completion_length=NEW,
            temperature=1.0, beta=0.0, learning_rate=RATE, max_steps=repeats + 1, report_to=[], save_strategy="no",
            use_cpu=True, bf16=False, gradient_checkpointing=False, logging_strategy="no", disable_tqdm=True,
            generation_kwargs={"min_new_tokens": NEW}, shuffle_dataset=False,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), reward_funcs=rewards,
            args=config, callbacks=[Steps()],
            processing_class=transformers.PreTrainedTokenizerFast(tokenizer_object=ids, pad_token="0", eos_token="2"),
            train_dataset=datasets.Dataset.from_list([{"prompt": " ".join(map(str, p))} for p in prompts]),
        )  # fmt: skip
        clock.watch(trainer, "_generate", "sampling")
        trainer.train()
    return clock.steps


# ---- the update alone


def update_alone(params: Params, data: Sequence[tuple[list[int], int]], repeats: int) -> dict[str, float]:
    """Figures of the update on four rollouts of each of four questions, with the lengths of GSM8K's solutions. The rollouts are
    packed into rows, or each is padded to the maximum length."""
    response, per_prompt, questions = 256, 4, data[:4]
    length = MAX_PROMPT + response
    rng = np.random.default_rng(0)
    solutions = iter(rng.choice([length for _, length in data], len(questions) * per_prompt, replace=False))
    questions_of_texts = [tokens for tokens, _ in questions for _ in range(per_prompt)]
    texts = [
        np.array([*tokens, *rng.integers(100, ARCH.vocab_size, min(next(solutions), response))], np.int32)
        for tokens in questions_of_texts
    ]
    padded = [np.pad(text, (0, length + 1 - len(text))) for text in texts]  # each fills one row
    sampled = np.zeros((len(texts), length + 1), bool)
    for row, tokens, text in zip(sampled, questions_of_texts, texts, strict=True):
        row[len(tokens) : len(text)] = True
    terms = Terms(
        weights=(sampled / sampled.sum()).astype(np.float32),
        advantages=rng.normal(size=(len(texts), 1)).astype(np.float32) * sampled,
        old_log_probs=np.full(sampled.shape, -10.8, np.float32),
    )
    config = config_of("grpo")
    optimizer = rl_optimizer(config.optimizer)
    update = make_train_step(optimizer, StepSpec(ARCH, make_algorithm(config).loss, 1.0, jnp.float32))
    state = TrainState(copy := jax.tree.map(jnp.copy, params), optimizer.init(copy))
    times = dict[str, list[float]](packed=[], padded=[])
    at_once = 2  # rows of the maximum length, in a micro-batch
    rollout = RolloutConfig(max_prompt_tokens=MAX_PROMPT, max_response_tokens=response)
    joined = Shapes(rollout, BranchingConfig()).packed(len(texts), at_once)  # the same number of slots in longer rows
    for _ in range(repeats + 1):  # the two forms in turns, so that changes of the machine's speed affect both
        for name, rows, shape in (("packed", texts, joined), ("padded", padded, PackedShape(at_once, length))):
            began = time.perf_counter()
            state, metrics = update(state, make_batch(rows, terms, shape))
            jax.block_until_ready(metrics)
            times[name].append(time.perf_counter() - began)
    packed_s, padded_s = (statistics.median(seconds[1:]) for seconds in times.values())
    tokens, distinct = sum(map(len, texts)), len({tuple(x[: t + 1]) for x in texts for t in range(1, len(x))})
    flops = 3 * flops_per_token(ARCH) / packed_s  # per token: forward and backward
    return {
        "packed_s": packed_s, "padded_s": padded_s, "ragged_over_padded": padded_s / packed_s, "tokens": tokens,
        "distinct_tokens": distinct, "padded_tokens": len(texts) * length, "gflops_of_tokens": flops * tokens / 1e9,
        "gflops_of_distinct_tokens": flops * distinct / 1e9,
    }  # fmt: skip


# ---- the report


def medians(steps: list[Times]) -> Times:
    """The median of each phase over all steps but the first, which compiles."""
    return {name: statistics.median(step[name] for step in steps[1:]) for name in steps[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with GSM8K's train.jsonl")
    parser.add_argument("--repeats", type=int, default=3, help="measured steps of each library")
    parser.add_argument("--only", nargs="+", help="measure only these: update, grpo, appo, tunix, trl; write no file")
    options = parser.parse_args()
    repeats, data = options.repeats, gsm8k(options.data)
    prompts, params = [tokens for tokens, _ in data[:PROMPTS]], init_params(ARCH, 0)

    def our_steps(algorithm: str) -> list[Times]:
        step = ours(algorithm, params, prompts)
        return [step() for _ in range(repeats + 1)]

    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as out:
        folder = Path(out)
        weights.save(folder, params, ARCH)
        runs: dict[str, Callable[[], dict[str, float]]] = {
            "update": lambda: update_alone(params, data, repeats),
            "grpo": lambda: medians(our_steps("grpo")),
            "appo": lambda: medians(our_steps("appo")),
            "tunix": lambda: medians(tunix(folder, prompts, repeats)),
            "trl": lambda: medians(trl(folder, prompts, repeats)),
        }
        for name in options.only or runs:
            found[name] = runs[name]()
            print(name, json.dumps({key: round(value, 3) for key, value in found[name].items()}), flush=True)
    rate = matmul_flops(repeats) / 1e9
    print(f"matmul {rate:.1f} GFLOP/s")
    if options.only:
        return
    record = {
        "machine": machine(), "repeats": repeats, "matmul_gflops": rate,
        "ratio_tunix": found["tunix"]["step"] / found["grpo"]["step"],
        "ratio_trl": found["trl"]["step"] / found["grpo"]["step"],
        "ragged_over_padded": found["update"]["ragged_over_padded"],
        "update_share_of_matmul_rate": found["update"]["gflops_of_tokens"] / rate,
        "update_share_of_matmul_rate_distinct": found["update"]["gflops_of_distinct_tokens"] / rate,
    } | found  # fmt: skip
    RESULT.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
