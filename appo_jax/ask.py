"""`appo-jax ask RUN`: ask a policy questions, and see its thoughts, tool calls and answers."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from appo_jax.components import Components, build, response_of
from appo_jax.config import Config
from appo_jax.config.bounds import temperature_problem
from appo_jax.errors import ConfigError, DataError
from appo_jax.export import policy_params
from appo_jax.output import harmless
from appo_jax.policy.parameters import Params
from appo_jax.reward.grade import final_answer
from appo_jax.rollout.sampler import Purpose
from appo_jax.types import Example, ToolCall


def ask(config: Config, run: Path, question: str | None, temperature: float) -> None:
    """Answer `question` with the policy of a run. None: read questions from the terminal, one per line, until an empty line.

    config: the run's, perhaps with another mesh."""
    for problem in temperature_problem("--temperature", temperature):
        raise ConfigError(problem)
    with build(config) as components:
        _, params = policy_params(components, run)
        console = Console()
        if question is not None:
            answer(components, params, question, (temperature, 0), console)
            return
        for number, text in enumerate(_typed(console)):
            try:
                answer(components, params, text, (temperature, number), console)
            except DataError as error:  # the next question may be shorter
                console.print(_plain(str(error)))


def answer(components: Components, params: Params, question: str, draw: tuple[float, int], console: Console) -> None:
    """Draw a rollout and show it turn by turn. `draw`: (temperature, number of the draw). Raises DataError for a question that
    is too long."""
    temperature, number = draw
    system = components.held_out[0].system if len(components.held_out) else ""
    example = Example("question", question, (), "qa", system)
    length = len(components.tokenizer.render_prompt(system, question))
    if length > (limit := components.config.rollout.max_prompt_tokens):
        raise DataError(
            f"the question has {length} tokens with its prompt, more than rollout.max_prompt_tokens = {limit}"
        )
    ((rollout,),) = components.sampler.initial(params, [example], 1, (Purpose.ASK, number), temperature)
    response = response_of(rollout, components.tokenizer)
    show_turns([text for text, _ in response.turns], rollout.calls, console)
    found = final_answer(response)
    console.print(_plain(f"answer: {found}" if found else f"no answer (it ended by {rollout.stop_reason})"))


def show_turns(turns: Sequence[str], calls: Sequence[ToolCall], console: Console) -> None:
    """Print the policy's turns, each with the result of the call that ends it."""
    for step, (text, call) in enumerate(zip(turns, (*calls, None), strict=False), 1):
        console.print(Panel(_plain(text.strip()), title=f"{step}. the policy", title_align="left"))
        if call is not None:
            title = _plain(f"{call.name}: {call.outcome}, {call.seconds:.2f} s")
            console.print(Panel(_plain(call.result.strip()), title=title, title_align="left", border_style="cyan"))


def _plain(text: str) -> Text:
    """Text without markup of rich and without control characters, which would reach the terminal."""
    return Text(harmless(text))


def _typed(console: Console) -> Iterable[str]:
    while True:
        if sys.stdin.isatty():
            console.print("question: ", end="")
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line
