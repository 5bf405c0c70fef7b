"""The `data` commands: `world` makes a generated world's dataset and trains its tokenizer; `describe` reports on a dataset."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from appo_jax.config import Config
from appo_jax.data.demonstrations import LeftOut, demonstrate, introduce
from appo_jax.data.describe import describe
from appo_jax.data.repetitions import find_overlaps
from appo_jax.data.source import Dataset, for_evaluation, load_dataset
from appo_jax.data.trace_files import read_traces
from appo_jax.errors import ConfigError
from appo_jax.output import harmless
from appo_jax.text.tokenizer import load_tokenizer, policy_tokenizer
from appo_jax.text.train_tokenizer import train_tokenizer
from appo_jax.tools.build import build_executor
from appo_jax.tools.executor import ToolExecutor
from appo_jax.tools.format import CallFormat, offer_tools


def prepare_world(config: Config) -> str:
    """Make the world of `config.data` (unless it exists) and train `config.policy.tokenizer` on it.

    The tokenizer is trained on documents, training questions, their system prompts and demonstrations with real tool results, but
    not on held-out questions. Returns a line that says what was made. Raises ConfigError if a tokenizer cannot be trained for this
    config.
    """
    path, architecture = config.policy.tokenizer, config.policy.architecture
    if path is None or not path.endswith(".model") or architecture is None:
        raise ConfigError(
            f"policy.tokenizer = {path!r}: a world's tokenizer is a new .model file, for a policy.architecture"
        )
    dataset = load_dataset(config.data)
    if dataset.demonstration is None:
        raise ConfigError(
            f"data.source = {config.data.source!r} has no demonstrations that a tokenizer could be trained on"
        )
    with build_executor(config.tools, dataset.documents) as executor:
        pieces = executor.call_format.pieces
        train_tokenizer(_texts(dataset, executor), Path(path), pieces, architecture.vocab_size)
    size = load_tokenizer(path).vocab_size
    if size > architecture.vocab_size:
        raise ConfigError(
            f"policy.architecture.vocab_size = {architecture.vocab_size}: the tokenizer has {size} tokens"
        )
    return (
        f"{len(dataset.train)} training and {len(dataset.held_out)} held-out questions, "
        f"{len(dataset.documents or ())} documents, {size} tokens in {path}"
    )


def describe_data(config: Config) -> str:
    """A report on the data of a config, before `data.drop` removes any.

    If the config's tokenizer exists already, lengths are those of prompts in tokens, as the policy will see them: with the tools
    described in them."""
    dataset = load_dataset(dataclasses.replace(config.data, drop=()))
    path = config.policy.tokenizer or config.policy.path
    tokenizer, traces = None, ""
    if config.sft.traces or (path is not None and Path(path).exists()):
        with build_executor(config.tools, dataset.documents) as executor:
            call_format = executor.call_format
        if path is not None and Path(path).exists():
            tokenizer = offer_tools(call_format, policy_tokenizer(config.policy))
        if config.sft.traces:
            traces = _describe_traces(config, dataset, call_format)
        train, held_out = (
            [introduce(e, call_format.instructions()) for e in part] for part in (dataset.train, dataset.held_out)
        )
        dataset = dataclasses.replace(dataset, train=train, held_out=held_out)
    return harmless(describe(dataset, config.data, tokenizer, config.rollout.max_prompt_tokens) + traces)


def _describe_traces(config: Config, dataset: Dataset, call_format: CallFormat) -> str:
    left_out = LeftOut()
    traces = read_traces(list(map(Path, config.sft.traces)), call_format, config.data.system_prompt, left_out)
    overlaps = find_overlaps([trace.example for trace in traces], for_evaluation(dataset, config.data))
    return (
        f"\n\ntraces of sft.traces: {len(traces)} can be used, {left_out.total} cannot ({left_out if left_out.total else '–'})\n"
        f"  overlaps: the questions of {len(overlaps)} are questions for evaluation (data.drop leaves them out)"
    )


def _texts(dataset: Dataset, executor: ToolExecutor) -> Iterator[str]:
    traces = demonstrate(dataset, executor)
    yield from (f"{document.title} {document.text}" for document in dataset.documents or ())
    yield from (example.question for example in dataset.train)
    yield from ("".join(segment.text for segment in trace.segments) for trace in traces)
    introduced = (introduce(example, executor.call_format.instructions()) for example in dataset.train)
    yield from dict.fromkeys(example.system for example in introduced if example.system)
