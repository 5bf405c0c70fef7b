"""When tool results are appended to rows, and in which batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from appo_jax.rollout.decode import AppendBatch
from appo_jax.rollout.rows import Row
from appo_jax.rollout.shapes import GenerationShapes

# An append stops every row, whether it has one result or a full batch. So results wait until there is a full batch, or
# until the first has waited this many times the duration of an append. A larger factor saves appends but loses more
# time in waiting rows: benchmarks/sampler.py's tool_overlap was 0.69 at ten and 0.73 at three.
APPEND_WAIT = 3.0


class Result(NamedTuple):
    """A tool result for a row."""

    row: int
    ids: list[int]


def append_batches(results: Sequence[Result], shapes: GenerationShapes) -> Iterator[AppendBatch]:
    """The results in batches, each of one padded length. On a mesh, each device gets the results of its own rows."""
    by_length: dict[int, list[Result]] = {}
    for result in results:
        by_length.setdefault(shapes.padded_result(len(result.ids)), []).append(result)
    for length, some in by_length.items():
        by_shard = [deque(result for result in some if shapes.shard(result.row) == s) for s in range(shapes.shards)]
        while any(by_shard):
            batch = AppendBatch.empty(shapes.append_rows, length, shapes.rows)
            for place in range(shapes.append_rows):
                if waiting := by_shard[place * shapes.shards // shapes.append_rows]:
                    row, ids = waiting.popleft()
                    batch.rows[place], batch.chunk[place, : len(ids)], batch.counts[place] = row, ids, len(ids)
            yield batch


def waited_long_enough(rows: Mapping[int, Row], now: float, append_s: float) -> bool:
    """Whether some result has waited APPEND_WAIT times the duration of an append (`append_s`)."""
    return any(row.ended is not None and now - row.ended_at >= APPEND_WAIT * append_s for row in rows.values())


def append_now(rows: Mapping[int, Row], waited: bool, late: Sequence[int], full_batch: int) -> bool:
    """Whether the waiting results are appended in this round. All hosts decide alike, because the arguments are equal
    on all.

    `waited`: some host's results have waited long enough. `late`: rows past their time, which end now, with their results.
    """
    waiting = sum(row.ended is not None for row in rows.values())
    decoding = any(row.decoding for row in rows.values())
    leaving = any(rows[w].ended is not None for w in late)
    return waiting > 0 and (waited or waiting >= full_batch or not decoding or leaving)
