"""The report of one set: report.md, report.json and items.jsonl in a folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from appo_jax.benchmark.figures import Graded
from appo_jax.benchmark.questions import shown
from appo_jax.benchmark.sets import Benchmark, benchmark
from appo_jax.output import cell, harmless
from appo_jax.types import StopReason

# Figures as report.md and `eval --compare` call them.
RULES = {"math": "equal value", "qa": "exact match", "gaia": "quasi-exact match", "judge": "a judge"}
OFFICIAL = {"em": "official exact match", "f1": "official token F1", "equal": "official equality"}


def write_report(folder: Path, record: Mapping[str, Any], graded: Sequence[Graded]) -> str:
    """Write report.md, report.json and items.jsonl; returns the text of report.md."""
    folder.mkdir(parents=True, exist_ok=True)
    text = to_markdown(record)
    (folder / "report.md").write_text(text + "\n", encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    # What UTF-8 cannot hold (half of a surrogate pair) becomes JSON's escape for it, what JSON cannot (a date) its text.
    with (folder / "items.jsonl").open("w", encoding="utf-8", errors="backslashreplace") as file:
        for g in graded:
            samples = [
                {"prediction": sample.text, "record": sample.record} | sample.rollout | dataclasses.asdict(verdict)
                for sample, verdict in zip(g.samples, g.verdicts, strict=True)
            ]
            line = dataclasses.asdict(g.item) | {"samples": samples}
            file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
    return text


def to_markdown(record: Mapping[str, Any]) -> str:
    found = benchmark(record["set"])
    lines = [
        f"# {record['title']}", "",
        f"{record['questions']} questions, {record['samples']} samples each. Graded by {RULES[found.rule]}; elsewhere: "
        f"{found.convention}. Intervals: 95 %, over questions.",
        "", "| figure | value |", "|---|---|", *_rows(record, found),
    ]  # fmt: skip
    if found.headline == "judge" and "judged" not in record:
        lines += ["", "The published figure of this set is a judge's: give --judge-url."]
    lines += _problems(record)
    if record["rollouts"]:
        lines += ["", "| rollouts | |", "|---|---|"]
        lines += [f"| {name.replace('_', ' ')} | {cell(_shown(value))} |" for name, value in record["rollouts"].items()]
    return harmless("\n".join(lines))


def _rows(record: Mapping[str, Any], found: Benchmark) -> list[str]:
    accuracy = "accuracy (mean over samples)"
    rows = {accuracy: record["accuracy"], "token F1": record["f1"]}
    rows |= {OFFICIAL[name]: x for name, x in record["official"].items()}
    by_judge = accuracy if found.rule == "judge" else "accuracy by the judge"
    if "judged" in record:
        rows[by_judge] = record["judged"]
    headline = {"accuracy": accuracy, "f1": OFFICIAL["f1"], "judge": by_judge}[found.headline]
    rows = {f"{name}: the published figure" if name == headline else name: x for name, x in rows.items()}
    if record["samples"] > 1:
        rows |= {f"pass@{k}": x for k, x in record["pass_at_k"].items()}
        rows |= {f"majority@{k}": x for k, x in record["majority_at_k"].items()} | {"majority": record["majority"]}
    for kind in ("level", "type", "language"):
        groups = record[f"by_{kind}"]
        rows |= {f"{kind} {name} ({group['questions']})": group["accuracy"] for name, group in groups.items()}
    return [f"| {cell(name)} | {percent(x)} |" for name, x in rows.items()]


def _problems(record: Mapping[str, Any]) -> list[str]:
    """What went wrong, by how it counts. report.json has every id."""
    lines: list[str] = []
    for title, lists in (
        ("Counted as wrong", {name.replace("_", " "): ids for name, ids in record["counted_as_wrong"].items()}),
        ("Counted by their own number of samples", {"uneven samples": record["uneven_samples"]}),
        ("Not counted: these are no questions of the set", {"unknown ids": record["unknown_ids"]}),
        ("Left out of the set's file", record.get("left_out", {})),
    ):
        found = [" ".join(f"- {name}: {len(ids)} ({shown(ids)})".split()) for name, ids in lists.items() if ids]
        lines += ["", f"{title}:", "", *found] if found else []
    for figure, of in (("accuracy", "without_verdict"), ("judged", "without_verdict_of_the_judge")):
        if record["counted_as_wrong"][of]:
            value = 100 * record[f"{figure}_if_open_are_right"]
            lines += ["", f"If all questions {of.replace('_', ' ')} were right: {value:.1f} %."]
    if late := record["rollouts"].get("stop_reasons", {}).get(StopReason.TIME):
        lines += [
            "", f"{late} rollouts ended because `rollout.max_seconds` was over, so the figures depend on the speed of the machine: "
            "raise it (`--rollout.max-seconds N` at the end of the command, with another `--out`)."
        ]  # fmt: skip
    return lines


def percent(figure: Sequence[float]) -> str:
    value, low, high = (100 * x for x in figure)
    return f"{value:.1f} % [{low:.1f}, {high:.1f}]"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {count}" for name, count in value.items())
    if value is None:  # a ratio to nothing
        return "–"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
