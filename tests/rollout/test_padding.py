"""Embedding rows that no token uses have no effect, even if their logits are large."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from growing import make_trees

from appo_jax.config import Architecture, BranchingConfig, LossConfig, RolloutConfig
from appo_jax.errors import ConfigError
from appo_jax.learner.batch import make_batch
from appo_jax.learner.loss import Terms
from appo_jax.learner.step import StepSpec, TrainState, make_train_step
from appo_jax.policy.architecture import for_tokenizer
from appo_jax.policy.packing import pack
from appo_jax.policy.parameters import Params, init_params
from appo_jax.policy.score import score
from appo_jax.rollout.growth import blank_tokens, valid_positions
from appo_jax.rollout.shapes import PackedShape
from appo_jax.text.tokenizer import SentencePieceTokenizer, Tokenizer
from appo_jax.tools.executor import ToolExecutor
from appo_jax.types import Example, Rollout

PADDING = 37


@pytest.fixture(scope="session", params=[False, True], ids=["own", "tied"])
def plain(request: pytest.FixtureRequest, arch: Architecture) -> Architecture:
    return dataclasses.replace(arch, num_layers=1, tie_embeddings=request.param)


@pytest.fixture(scope="session")
def without(plain: Architecture) -> Params:
    """A policy with a row for each token."""
    return jax.tree.map(lambda x: 1.4 * x, init_params(plain, seed=1))


class Moved(NamedTuple):
    """The same policy with additional rows, whose logits are the largest of all at most positions."""

    arch: Architecture
    params: Params
    ids: np.ndarray  # [V] where each token's row is
    missing: tuple[int, ...]  # the rows between


@pytest.fixture(scope="session", params=["behind", "within", "both"])
def padded(request: pytest.FixtureRequest, plain: Architecture, without: Params) -> Moved:
    """Additional rows after those of the tokens, between them, or both."""
    V, total = plain.vocab_size, plain.vocab_size + PADDING
    end = {"behind": V, "within": total, "both": V + PADDING // 2}[request.param]  # of the tokens' rows
    ids = np.sort(np.random.default_rng(0).permutation(end - 1)[: V - 1])
    ids = np.append(ids, end - 1)
    missing = tuple(int(id) for id in np.setdiff1d(np.arange(end), ids))
    rows = 5 * jax.random.normal(jax.random.key(3), (total, plain.width))
    params = without | {"embed": rows.at[ids].set(without["embed"])}
    if "unembed" in without:
        params["unembed"] = rows.T.at[:, ids].set(without["unembed"])
    return Moved(for_tokenizer(dataclasses.replace(plain, vocab_size=total), end, missing), params, ids, missing)


class MovedTokenizer:
    """A tokenizer whose tokens have other ids."""

    def __init__(self, plain: SentencePieceTokenizer, moved: Moved):
        self.plain, self.ids, self.missing_ids = plain, moved.ids.tolist(), moved.missing
        self.vocab_size = self.ids[-1] + 1
        self.eos_id, self.pad_id = self.ids[plain.eos_id], self.ids[plain.pad_id]
        self.eos_ids = (self.eos_id,)
        self.pieces = [b""] * self.vocab_size
        for id, piece in zip(self.ids, plain.token_bytes(), strict=True):
            self.pieces[id] = piece

    def encode(self, text: str) -> list[int]:
        return [self.ids[id] for id in self.plain.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.pieces[id] for id in ids).decode(errors="replace")

    def token_bytes(self) -> list[bytes]:
        return self.pieces

    def render_prompt(self, system: str, question: str) -> list[int]:
        return [self.ids[id] for id in self.plain.render_prompt(system, question)]


@pytest.mark.parametrize("config", [{}, {"top_k": 5}, {"top_p": 0.7}, {"temperature": 0.3}])
def test_padding_is_never_drawn(
    config: dict[str, float], plain: Architecture, without: Params, padded: Moved,
    tokenizer: SentencePieceTokenizer, executor: ToolExecutor, examples: list[Example], rollout_config: RolloutConfig,
) -> None:  # fmt: skip
    rollouts = dataclasses.replace(rollout_config, max_response_tokens=24, max_result_tokens=12, **config)

    def draw(arch: Architecture, params: Params, tokenizer: Tokenizer, temperature: float | None) -> list[Rollout]:
        sampler, _ = make_trees(arch, tokenizer, executor, rollouts, BranchingConfig())
        return [rollout for tree in sampler.initial(params, examples, 2, (0, 0), temperature) for rollout in tree]

    for temperature in (None, 0.0) if not config else (None,):  # 0: greedy
        found = draw(padded.arch, padded.params, MovedTokenizer(tokenizer, padded), temperature)
        expected = draw(plain, without, tokenizer, temperature)
        for a, b in zip(found, expected, strict=True):
            assert a.tokens.tolist() == padded.ids[b.tokens].tolist()
            np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-5)
            np.testing.assert_allclose(a.entropies, b.entropies, atol=1e-5)


def test_log_probs_entropies_and_gradients_are_those_without_padding(
    plain: Architecture, without: Params, padded: Moved
) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, plain.vocab_size, (2, 11)).astype(np.int32)
    terms = Terms(
        np.full((2, 11), 0.1, np.float32), rng.normal(size=(2, 11)).astype(np.float32),
        rng.normal(-4, 0.2, (2, 11)).astype(np.float32),
    )  # fmt: skip

    def numbers(arch: Architecture, params: Params, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, Params]:
        batch, rows = make_batch(tokens, terms, PackedShape(2, 10)), pack(tokens, 10).rows
        scored = score(params, rows, arch=arch, temperature=0.7, dtype=jnp.dtype("float32"))
        loss = LossConfig(entropy_weight=0.5)  # the entropy's gradient is where masked logits give NaN
        step = make_train_step(optax.sgd(1.0), StepSpec(arch, loss, 0.7, jnp.dtype("float32")))
        copy = jax.tree.map(jnp.array, params)
        state, _ = step(TrainState(copy, optax.sgd(1.0).init(copy)), batch)
        grads = jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), params, state.params)
        return np.asarray(scored.log_probs), np.asarray(scored.entropies), grads

    ids, others = padded.ids, np.setdiff1d(np.arange(padded.arch.vocab_size), padded.ids)
    found, expected = numbers(padded.arch, padded.params, ids[tokens]), numbers(plain, without, tokens)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-5)
    cut = found[2] | {"embed": found[2]["embed"][ids]}
    assert not found[2]["embed"][others].any()
    if "unembed" in cut:
        assert not cut["unembed"][:, others].any()
        cut["unembed"] = cut["unembed"][:, ids]
    for a, b in zip(jax.tree.leaves(cut), jax.tree.leaves(expected[2]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-5)  # gradients of up to 30: a few units in the last place


def test_text_functions_do_not_fall_over_padding(tokenizer: SentencePieceTokenizer, rollouts: list[Rollout]) -> None:
    beyond = [tokenizer.vocab_size, tokenizer.vocab_size + PADDING]
    text = tokenizer.encode("the fox")
    assert tokenizer.decode([beyond[0], *text, beyond[1]]) == "the fox"
    rollout = dataclasses.replace(rollouts[0], tokens=rollouts[0].tokens.copy())
    last = int(np.flatnonzero(rollout.sampled)[-2])
    rollout.tokens[last] = beyond[1]
    assert not valid_positions(rollout, blank_tokens(tokenizer), BranchingConfig(), tokenizer.eos_ids)[last]


@pytest.fixture(scope="session")
def rollouts(
    arch: Architecture, params: Params, tokenizer: SentencePieceTokenizer, executor: ToolExecutor,
    examples: list[Example], rollout_config: RolloutConfig,
) -> list[Rollout]:  # fmt: skip
    sampler, _ = make_trees(arch, tokenizer, executor, rollout_config, BranchingConfig())
    return sampler.initial(params, examples[:1], 1, (0, 0))[0]


def test_the_architecture_of_a_tokenizer(arch: Architecture) -> None:
    assert for_tokenizer(arch, arch.vocab_size) == arch  # each row has a token: the very programs of before
    with pytest.raises(ConfigError, match=rf"it has {arch.vocab_size + 1} ids, but .* {arch.vocab_size} rows"):
        for_tokenizer(arch, arch.vocab_size + 1)
