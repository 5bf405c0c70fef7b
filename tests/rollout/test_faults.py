"""Rollouts over a search server that fails in every way: each has a stop reason, and the metrics count each fault."""

from collections.abc import Iterator

import pytest
from faulty_server import Server
from growing import draw_and_grow, make_trees

from appo_jax.config import Architecture, BranchingConfig, RolloutConfig, SearchToolConfig, ToolsConfig
from appo_jax.policy.parameters import Params
from appo_jax.rollout.stats import rollout_metrics
from appo_jax.text.tokenizer import SentencePieceTokenizer
from appo_jax.tools.executor import ToolExecutor
from appo_jax.tools.format import Call
from appo_jax.tools.web import WebSearch
from appo_jax.types import Example, Outcome, StopReason

FAULTS = ("hang", "429", "500", "garbage", "flood", "half", "fine")


class AtO:
    """A call format for a random policy: every "o" asks the search server, one way of failing after another."""

    def __init__(self) -> None:
        self.asked = 0

    tools = ()

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return ("o",)

    def parse(self, text: str) -> Call | str:
        self.asked += 1
        return Call("search", f"{FAULTS[self.asked % len(FAULTS)]} {self.asked}")

    result_marks = (" ", " ")


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()


def test_a_step_over_a_broken_server_completes(
    server: Server, arch: Architecture, tokenizer: SentencePieceTokenizer, params: Params, examples: list[Example],
    rollout_config: RolloutConfig, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("appo_jax.tools.lanes.TRIP_AFTER", 10**6)  # every fault shall be met, not only the first
    search = WebSearch(SearchToolConfig(url=server.url, allow_private=True, timeout=0.5, max_retries=1))
    with ToolExecutor([search], ToolsConfig(enabled=("search",), max_concurrency=16), AtO()) as executor:
        sampler, grower = make_trees(arch, tokenizer, executor, rollout_config, BranchingConfig(num_branch_points=2))
        grown = draw_and_grow(sampler, grower, params, examples)[2].trees
        record = rollout_metrics(grown, sampler.take_stats()) | executor.metrics()
    rollouts = [rollout for tree in grown for rollout in tree]
    assert len(rollouts) == len(examples) * rollout_config.budget
    assert all(isinstance(rollout.stop_reason, StopReason) for rollout in rollouts)
    calls = [call for rollout in rollouts for call in rollout.calls]
    assert len(calls) > 3 * len(FAULTS)
    assert all(call.result for call in calls)  # each failure became text
    assert {call.outcome for call in calls} >= {Outcome.OK, Outcome.UNAVAILABLE}
    for kind in ("timeout", "status_429", "status_500", "garbage", "too_large", "cut_off"):
        assert record[f"tools/search/fault_{kind}"] > 0, record
