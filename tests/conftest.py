"""Every test runs on the CPU, with the shared data folder where the environment names one."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data sets (gsm8k/, hotpotqa/, ...); tests that need it are skipped without APPO_JAX_DATA."""
    folder = os.environ.get("APPO_JAX_DATA")
    if not folder:
        pytest.skip("APPO_JAX_DATA does not name the folder of the data sets")
    return Path(folder)
