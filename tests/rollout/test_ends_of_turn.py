"""Every id that the model declares as an end of turn ends a rollout, and no branch begins after it."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
from growing import make_trees

from appo_jax.config import Architecture, BranchingConfig, RolloutConfig
from appo_jax.policy.parameters import Params
from appo_jax.rollout.growth import blank_tokens, valid_positions
from appo_jax.text.tokenizer import SentencePieceTokenizer
from appo_jax.tools.executor import ToolExecutor
from appo_jax.types import Example, Rollout, StopReason


def test_each_end_of_turn_ends_a_rollout(
    arch: Architecture, params: Params, tokenizer: SentencePieceTokenizer, executor: ToolExecutor,
    examples: list[Example], rollout_config: RolloutConfig,
) -> None:  # fmt: skip
    config = dataclasses.replace(rollout_config, max_response_tokens=40, max_result_tokens=12)
    [extra, further] = (tokenizer.encode(letter)[0] for letter in "ae")

    def draw(*more: int) -> list[Rollout]:
        with_ends = copy.copy(tokenizer)
        with_ends.eos_ids = (tokenizer.eos_id, *more)
        sampler, _ = make_trees(arch, with_ends, executor, config, BranchingConfig())
        return [rollout for tree in sampler.initial(params, examples, 8, (0, 0)) for rollout in tree]

    alone, found = draw(), draw(extra, further)
    ends = {tokenizer.eos_id, extra, further}
    assert {int(r.tokens[-1]) for r in found if r.stop_reason is StopReason.ANSWERED} == ends
    for before, after in zip(alone, found, strict=True):
        # The same draws, cut where the first of the ends was drawn.
        drawn = np.flatnonzero(np.isin(before.tokens, list(ends)) & before.sampled)
        length = int(drawn[0]) + 1 if len(drawn) else before.length
        assert after.tokens.tolist() == before.tokens[:length].tolist()
        assert (after.stop_reason is StopReason.ANSWERED) == bool(len(drawn))
        inside = dataclasses.replace(after, tokens=np.append(after.tokens, 5), sampled=np.append(after.sampled, True))
        branching = BranchingConfig(include_token=True, skip_blank=False)
        valid = valid_positions(inside, blank_tokens(tokenizer), branching, sorted(ends))
        assert valid[length - 1] == (not len(drawn) and bool(after.sampled[-1]))
