"""A language model that judges answers."""

from __future__ import annotations

import dataclasses

from pydantic import NonNegativeFloat, PositiveInt

from appo_jax.config.bounds import Seconds


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """The judge's address and the limits of its requests."""

    url: str
    """Base URL of an OpenAI-compatible endpoint; `/chat/completions` is appended."""
    model: str
    """Name of the model there. Paper: Qwen2.5-72B-Instruct."""
    temperature: NonNegativeFloat | None = 0.0
    """Sampling temperature of its replies. None: requests do not state one, for models that refuse it."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; no key is sent where it is not set."""
    concurrency: PositiveInt = 8
    """Requests at the same time."""
    timeout: Seconds = 60.0
    """Seconds for one request."""
    attempts: PositiveInt = 4
    """Requests for one verdict, with growing pauses between them, or the pauses that the server asks for."""
    cache: str | None = None
    """SQLite file of verdicts, which runs may share. None: in the folder of the run or of the report."""
