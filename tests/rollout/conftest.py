"""A small real world for the sampler: a two-layer policy, a sentencepiece tokenizer, a search tool, real threads.

The vocabulary has some 60 tokens, so a random policy writes `</search>` every few dozen tokens and its rollouts have
tool calls (mostly malformed, which is as good: their explanations are results too).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sentencepiece
from growing import make_trees, random_params

from appo_jax.config import Architecture, BranchingConfig, RolloutConfig, ToolsConfig
from appo_jax.policy.parameters import Params
from appo_jax.rollout.engine import Engine
from appo_jax.rollout.growth import TreeGrower
from appo_jax.rollout.tree_sampler import TreeSampler
from appo_jax.text.tokenizer import CONTROL_SYMBOLS, SentencePieceTokenizer
from appo_jax.tools.executor import ToolExecutor
from appo_jax.tools.search import LocalSearch
from appo_jax.types import Document, Example

TEXT = ["the quick brown fox jumps over the lazy dog . < / > 0 1 2 3 4 5 6 7 8 9"] * 20
TAGS = [f"<{slash}{tag}>" for tag in ("think", "search", "python", "result", "answer") for slash in ("", "/")]
ROLLOUT = RolloutConfig(
    num_initial=3, budget=9, max_prompt_tokens=12, max_response_tokens=60, max_result_tokens=24, max_tool_calls=3,
    decode_rows=16, max_seconds=120,
)  # fmt: skip


@pytest.fixture(scope="session")
def text() -> list[str]:
    return TEXT


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, text: list[str]) -> SentencePieceTokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tiny"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(path), model_type="char", vocab_size=64, hard_vocab_limit=False,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, control_symbols=list(CONTROL_SYMBOLS),
        user_defined_symbols=[*TAGS, "\n"], add_dummy_prefix=False, remove_extra_whitespaces=False,
        normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    return SentencePieceTokenizer(path.with_suffix(".model"))


@pytest.fixture(scope="session")
def executor() -> Iterator[ToolExecutor]:
    documents = [Document("fox", "the fox is quick"), Document("dog", "the dog is lazy")]
    config = ToolsConfig(enabled=("search",))
    with ToolExecutor([LocalSearch(documents, top_k=1)], config) as executor:
        yield executor


@pytest.fixture(scope="session")
def arch(tokenizer: SentencePieceTokenizer) -> Architecture:
    return Architecture(
        vocab_size=tokenizer.vocab_size, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=64
    )


@pytest.fixture(scope="session")
def params(arch: Architecture) -> Params:
    return random_params(arch)


@pytest.fixture(scope="session")
def examples() -> list[Example]:
    return [
        Example(f"q{i}", question, ("x",), "qa", "") for i, question in enumerate(("the fox", "lazy dog", "7 dogs"))
    ]


@pytest.fixture(scope="session")
def rollout_config() -> RolloutConfig:
    return ROLLOUT


@pytest.fixture
def grower(arch: Architecture, tokenizer: SentencePieceTokenizer, executor: ToolExecutor) -> TreeGrower:
    return make_trees(arch, tokenizer, executor, ROLLOUT, BranchingConfig(num_branch_points=2))[1]


@pytest.fixture
def sampler(grower: TreeGrower) -> TreeSampler:
    return grower.sampler


@pytest.fixture
def engine(sampler: TreeSampler) -> Engine:
    return sampler.engine
