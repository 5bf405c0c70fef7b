"""The report of `appo-jax data describe` on a data source: counts, lengths, answers, repetitions, examples."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import numpy as np

from appo_jax.config import DataConfig
from appo_jax.data.repetitions import find_repetitions
from appo_jax.data.source import Dataset, for_evaluation
from appo_jax.text.tokenizer import Tokenizer
from appo_jax.types import Example

NUM_EXAMPLES = 10
_LEVELS = (0, 50, 90, 99, 100)  # percentiles


def describe(dataset: Dataset, config: DataConfig, tokenizer: Tokenizer | None, max_prompt_tokens: int) -> str:
    """The report. Lengths are those of prompts in tokens if a tokenizer is given, else those of questions in characters.

    Raises ConfigError or DataError."""
    lines = [f"{config.source}{'' if config.path is None else f' at {config.path}'}"]
    for name, examples in (("train", dataset.train), ("held out", dataset.held_out)):
        lines += ["", f"{name}: {len(examples)} questions"]
        if examples:
            lines += [*_counts(examples), _lengths(examples, tokenizer, max_prompt_tokens), *_identities(examples)]
    lines += ["", f"documents for the search tool: {len(dataset.documents or ())}"]
    lines.append(f"demonstrations for the cold start: at most {dataset.num_demonstrations}")
    lines += ["", *_repetitions(dataset.train, for_evaluation(dataset, config), config)]
    lines += ["", f"{NUM_EXAMPLES} examples of train, evenly spaced:"]
    for index in np.linspace(0, len(dataset.train) - 1, min(NUM_EXAMPLES, len(dataset.train))).astype(int):
        example = dataset.train[index]
        golds = " | ".join(map(repr, example.golds[:4])) + (" | …" if len(example.golds) > 4 else "")
        lines += [f"- {example.id} ({example.kind}): {_short(example.question)}", f"  accepted: {_short(golds)}"]
    return "\n".join(lines)


def _counts(examples: Sequence[Example]) -> list[str]:
    lines = []
    for kind, count in sorted(collections.Counter(example.kind for example in examples).items()):
        golds = [gold for example in examples if example.kind == kind for gold in example.golds]
        numbers = sum(gold.lstrip("-").replace(",", "").replace(".", "", 1).isdigit() for gold in golds)
        several = sum(len(example.golds) > 1 for example in examples if example.kind == kind)
        lines.append(
            f"  {kind}: {count} questions; {len(golds)} accepted answers, {numbers} of them plain numbers; {several} questions "
            "accept several"
        )
    sources = collections.Counter(example.source for example in examples if example.source)
    if len(sources) > 1:
        lines.append("  by set: " + ", ".join(f"{name} {count}" for name, count in sources.most_common(20)))
    prompts = len({example.system for example in examples})
    lines.append(f"  system prompts: {prompts} different")
    return lines


def _lengths(examples: Sequence[Example], tokenizer: Tokenizer | None, max_prompt_tokens: int) -> str:
    if tokenizer is None:
        lengths = [len(example.question) for example in examples]
        what, note = "question, in characters", ""
    else:
        lengths = [len(tokenizer.render_prompt(example.system, example.question)) for example in examples]
        too_long = sum(length > max_prompt_tokens for length in lengths)
        what, note = "prompt, in tokens", f"; {too_long} above rollout.max_prompt_tokens = {max_prompt_tokens}"
    names = ("shortest", "median", "90 %", "99 %", "longest")
    values = np.percentile(lengths, _LEVELS).round().astype(int)
    return f"  {what}: " + ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True)) + note


def _identities(examples: Sequence[Example]) -> list[str]:
    twice = [id for id, count in collections.Counter(example.id for example in examples).items() if count > 1]
    return [f"  ids given twice: {len(twice)}, such as {twice[0]}"] if twice else []


def _repetitions(train: Sequence[Example], evaluation: Sequence[Example], config: DataConfig) -> list[str]:
    found = find_repetitions(train, evaluation)
    files = "".join(f", {file}" for file in config.evaluation)
    lines = ["repetitions in train (data.drop leaves them out):"]
    for kind, of in (
        ("duplicates", "an earlier question"), ("near_duplicates", "an earlier question"),
        ("overlaps", f"a question for evaluation (held out{files})"),
    ):  # fmt: skip
        pairs = getattr(found, kind)
        such = f", such as {train[pairs[0][0]].id} and {pairs[0][1]}" if pairs else ""
        lines.append(f"  {kind}: {len(pairs)} of {of}{such}")
    return lines


def _short(text: str, limit: int = 200) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 2] + " …"
