"""Every test runs on the CPU, with the shared data folder where the environment names one."""

import dataclasses
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from collections.abc import Callable
from pathlib import Path

import pytest

from appo_jax.config import Config
from appo_jax.config_io import load_config

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.py"


@pytest.fixture(scope="session")
def short_quickstart() -> Callable[[Path], Config]:
    """The quickstart's policy and world in a folder of their own, with short steps."""

    def config(folder: Path) -> Config:
        c = load_config(QUICKSTART)
        return dataclasses.replace(
            c,
            prompts_per_step=4,
            prompts_per_minibatch=2,
            checkpoint_every=1,
            policy=dataclasses.replace(c.policy, tokenizer=str(folder / "world.model")),
            data=dataclasses.replace(c.data, path=str(folder / "world")),
            rollout=dataclasses.replace(c.rollout, max_response_tokens=64, decode_rows=24),
            sft=dataclasses.replace(c.sft, batch_size=4),
        )

    return config


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data sets (gsm8k/, hotpotqa/, ...); tests that need it are skipped without APPO_JAX_DATA."""
    folder = os.environ.get("APPO_JAX_DATA")
    if not folder:
        pytest.skip("APPO_JAX_DATA does not name the folder of the data sets")
    return Path(folder)
