"""Shapes of all programs of a generation, and of the score passes before branching. The sampler and `appo-jax plan` use
the same functions, so they cannot disagree. The shapes do not depend on what the policy writes, only on the config, the
mesh and bounds that are known before a step.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from appo_jax.algorithms import Algorithm
from appo_jax.branching.rules import RULES
from appo_jax.config import BranchingConfig, Config, RolloutConfig

# Tool results are appended for this many rows at a time (for more on a mesh that cannot split this many). The number is
# fixed because a row's arithmetic must not depend, even in the last bit, on how many tools finish at the same moment.
APPEND_ROWS = 8
# A pass over packed rows has this many slots on each device, or as many as the longest rollout needs. With more, more of a
# mini-batch's last pass is empty, and on a CPU the time per token is not shorter.
AT_ONCE = 512
# Rows are joined to rows of at most this many slots: rollouts of one prompt share its slots only within a row, and long rows
# are filled better. Attention over still longer rows costs more than that saves where it computes the slots that it masks.
MAX_JOINED = 1024


class PackedShape(NamedTuple):
    """The shape of the packed rows that go through the policy at once."""

    rows: int  # R
    length: int  # T: the slots of a row

    def max_passes(self, rollouts: int, max_tokens: int) -> int:
        """The passes that hold this many rollouts of at most `max_tokens` tokens, whatever their lengths.

        A rollout needs a slot for each of its tokens but the last. A row that has no room for another holds at least as many
        rollouts as fit if all are of maximum length.
        """
        return -(-rollouts // (self.rows * (self.length // max(1, max_tokens - 1))))


@dataclasses.dataclass(frozen=True)
class GenerationShapes:
    """Sizes of one generation's arrays, in the axis letters of types.py and decode.py."""

    rows: int  # W: rows that decode together
    slots: int  # R: prefixes held at the same time
    columns: int  # C: rows that may continue one prefix at the same time
    prefix_length: int  # T of a prefix slot
    suffix_length: int  # S: the last prefix token, and everything that a row may add to it
    append_rows: int  # A: rows of one append of tool results
    result_lengths: tuple[int, ...]  # Q: the lengths to which tool results are padded, rising
    shards: int  # number of parts into which the mesh splits rows and slots

    def padded_result(self, length: int) -> int:
        """The length to which a tool result of `length` tokens is padded."""
        return next(padded for padded in self.result_lengths if padded >= length)

    def shard(self, row: int) -> int:
        """The part of the mesh that holds a row."""
        return row * self.shards // self.rows


@dataclasses.dataclass(frozen=True)
class Shapes:
    """All shapes of a run's rollouts.

    `shards`: how many parts the mesh splits rows into (`row_shards`). Numbers of rows are rounded up to a multiple of it; the
    rows that this adds stay empty.
    """

    rollout: RolloutConfig
    branching: BranchingConfig
    shards: int = 1

    @classmethod
    def of(cls, algorithm: Algorithm, shards: int = 1) -> Shapes:
        """The shapes of an algorithm's rollouts."""
        return cls(algorithm.rollout, algorithm.branching, shards)

    @property
    def rollout_length(self) -> int:
        """T: the maximal tokens of a rollout, prompt and response."""
        return self.rollout.max_prompt_tokens + self.rollout.max_response_tokens

    def rounded_up(self, rows: int) -> int:
        """`rows`, or the next number of rows that the mesh can split."""
        return -(-rows // self.shards) * self.shards

    def prefill_rows(self, max_prompts: int) -> int:
        """Prompts of one prefill pass, for at most `max_prompts` prompts."""
        return self.rounded_up(min(self.rollout.decode_rows, max_prompts))

    def packed(self, max_rollouts: int, rows: int = 0) -> PackedShape:
        """The packed rows that go through the policy at once, where there are at most `max_rollouts` rollouts.

        `rows`: the pass has as many slots as this many rollouts of maximum length; 0: AT_ONCE slots on each device. It never has
        more than `max_rollouts` of them need. Rows are joined to fewer, longer ones, as far as the mesh can split them.
        """
        length = self.rollout_length
        rows = rows or self.shards * max(1, AT_ONCE // length)
        rows = self.rounded_up(min(rows, max_rollouts))
        on_device = rows // self.shards
        joined = max(n for n in range(1, on_device + 1) if on_device % n == 0 and (n == 1 or n * length <= MAX_JOINED))
        return PackedShape(rows // joined, joined * length)

    def update(self, config: Config, algorithm: Algorithm) -> PackedShape:
        """The packed rows of a micro-batch of the update."""
        trained = config.prompts_per_minibatch * algorithm.trained_per_prompt
        return self.packed(trained, config.optimizer.micro_batch)

    def max_scored(self, num_trees: int, num_initial: int) -> list[int]:
        """For each branching loop, the maximal number of rollouts that it scores. Each tree begins with `num_initial`
        rollouts."""
        sizes = RULES[self.branching.score].max_sizes(num_initial, self.rollout.budget, self.branching)
        return [num_trees * size for size in sizes[:-1]]

    def initial(self, max_examples: int, copies: int) -> GenerationShapes:
        """Shapes of the generation that draws `copies` rollouts of each of at most `max_examples` prompts."""
        return self.generation(max_examples, copies, self.rollout.max_prompt_tokens)

    def branches(self, max_rollouts: int) -> GenerationShapes:
        """Shapes of the generation that branches at most `max_rollouts` scored rollouts."""
        return self.generation(max_rollouts, self.branching.num_branch_points, self.rollout_length)

    def generation(self, max_groups: int, columns: int, prefix_length: int) -> GenerationShapes:
        """Shapes of a generation of at most `max_groups` prefixes, each continued by at most `columns` rows at the same
        time. Without `rollout.share_prefix` every row has its own prefix slot.
        """
        if not self.rollout.share_prefix:
            max_groups, columns = max_groups * columns, 1
        rows = self.rounded_up(min(self.rollout.decode_rows, max_groups * columns))
        # The last of C rows on one prefix ends long after the first: twice the slots keep all rows busy until then.
        slots = rows if columns == 1 else min(2 * -(-rows // columns), max_groups)
        return GenerationShapes(
            rows, self.rounded_up(slots), columns, prefix_length, self.rollout.max_response_tokens + 1,
            self.rounded_up(APPEND_ROWS), result_lengths(self.rollout.max_result_tokens), self.shards,
        )  # fmt: skip


def result_lengths(max_result_tokens: int) -> tuple[int, ...]:
    """32, 128, 512 … while well below the limit of a tool result, and that limit."""
    lengths = [32]
    while 2 * lengths[-1] < max_result_tokens:
        lengths.append(4 * lengths[-1])
    return (*lengths[:-1], max_result_tokens)
