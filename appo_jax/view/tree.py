"""A rollout tree in the terminal."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from appo_jax.dumps import dumped_steps, read_dump, spans
from appo_jax.errors import DataError
from appo_jax.output import harmless


def show_tree(run_dir: str | Path, step: int | None = None, index: int = 0, console: Console | None = None) -> None:
    """Print tree `index` of a step's dump (by default the last one): text, tool results, branch points, rewards.

    Raises DataError, with the steps or trees that exist, if this one does not.
    """
    folder = Path(run_dir) / "rollouts"
    dumps = dumped_steps(folder)
    steps = list(dumps)
    if not steps:
        if (Path(run_dir) / "metrics.jsonl").exists():
            raise DataError(f"{folder}: no rollout dumps, so there is no tree to show, although the run has made steps")
        raise DataError(f"{folder}: no rollout dumps; give the directory of a run that has made a step")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise DataError(f"{folder}: no dump of step {step}; there are {spans(steps)}")
    trees = list(read_dump(dumps[step]))
    if not 0 <= index < len(trees):
        raise DataError(f"{folder}: step {step} has no tree {index}; give 0 to {len(trees) - 1}")
    console = console or Console()
    console.print(render_tree(trees[index]))


def render_tree(record: dict[str, Any]) -> Tree:
    """A dumped tree (see `dumps.tree_record`) for rich: each branch is below the rollout it was branched from. ⑂n in a
    text marks where rollout n was branched off; rollout n shares everything before the mark.
    """
    children = defaultdict(list)
    for node in record["nodes"]:
        children[node["parent"]].append(node)
    top = Tree(
        Text.assemble(
            (harmless(f"step {record['step']} · {record['id']}"), "bold"),
            f"\n{harmless(record['question'])}\n",
            (harmless("gold: " + " | ".join(record["golds"])), "green"),
        ),
        guide_style="bright_black",
    )

    def grow(branch: Tree, parent: int | None) -> None:
        for node in children[parent]:
            grow(branch.add(_render_node(node, children[node["node"]])), node["node"])

    grow(top, None)
    return top


def _render_node(node: dict[str, Any], branches: list[dict[str, Any]]) -> Text:
    right = ("✓", "bold green") if node["correct"] else ("✗", "bold red")
    origin = "initial" if node["parent"] is None else f"branch of {node['parent']} at token {node['fork']}"
    reward = "–" if node["reward"] is None else f"{node['reward']:.2f}"
    calls = ", ".join(f"{call['name']} {call['outcome']}" for call in node["calls"])
    text = Text.assemble(
        (f"rollout {node['node']}", "bold"),
        f" ({origin}) ",
        right,
        f" reward {reward} · {node['tokens']} tokens · {node['stop_reason']}"
        + (f" · calls: {harmless(calls)}" if calls else ""),
        "\n",
    )
    for segment in node["segments"]:
        for branch in branches:
            if branch["fork"] == segment["start"]:
                text.append(f"⑂{branch['node']}", style="bold magenta")
        text.append(harmless(segment["text"]), style="" if segment["sampled"] else "cyan dim")
    return text
