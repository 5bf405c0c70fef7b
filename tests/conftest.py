"""Every test runs on the CPU, with the shared data folder where the environment names one."""

# ruff: noqa: E402 - what stands before the imports changes what they do

import atexit
import dataclasses
import gc
import os
import shutil
import signal
import socket
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile far more than they compute. So programs are compiled quickly here and in the processes that tests start:
# without LLVM's optimizations, by the older and faster of XLA's code generators, each in one piece, and once for all processes
# of these tests.
# JAX_DISABLE_MOST_OPTIMIZATIONS=0 compiles them as users do; for one test the fixture `optimized` does.
if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1":
    quick = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    if quick not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}".strip()
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the first process of pytest; its workers inherit the folder
    cache = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="appo-tests-xla-")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)

from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

# Shapes that these modules declare are checked whenever a test calls or traces a function. Nothing checks them elsewhere.
install_import_hook(
    ["appo_jax.advantage", "appo_jax.branching", "appo_jax.learner.loss", "appo_jax.ops", "appo_jax.policy.logprobs"],
    "beartype.beartype",
)

from appo_jax import heartbeat
from appo_jax.config import Architecture, Config
from appo_jax.config_io import check, load_config
from appo_jax.data import world
from appo_jax.prepare import prepare_world

# The first example of a jitted function pays for its compilation: no deadline per example.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")

# A shell's background jobs ignore SIGINT, and so would the processes that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.py"


@pytest.fixture(autouse=True, scope="module")
def short_collections() -> None:
    """Let the garbage collector skip what earlier files left, above all the programs that jax keeps: it would visit these
    millions of objects again and again, which took 40 % of the time of the tests of rollouts."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reset the state of the heartbeat, so that a test does not see the phase of an earlier test's run."""
    monkeypatch.setattr(heartbeat, "_life", heartbeat._Life())


@pytest.fixture
def optimized() -> Iterator[None]:
    """Compile the programs of this test with LLVM's optimizations, as in a real run. For tests that compare bits."""
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1")
    jax.clear_caches()


@pytest.fixture(scope="session")
def short_quickstart() -> Callable[[Path], Config]:
    """The quickstart with a small policy and short steps, its world in a folder of the test's."""

    def config(folder: Path) -> Config:
        c = load_config(QUICKSTART)
        small = dataclasses.replace(
            c.policy.architecture, width=64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, mlp_width=128
        )
        return dataclasses.replace(
            c,
            prompts_per_step=4,
            prompts_per_minibatch=2,
            checkpoint_every=1,
            policy=dataclasses.replace(c.policy, architecture=small, tokenizer=str(folder / "world.model")),
            data=dataclasses.replace(c.data, path=str(folder / "world")),
            rollout=dataclasses.replace(c.rollout, max_response_tokens=64, decode_rows=24),
            sft=dataclasses.replace(c.sft, batch_size=4),
        )

    return config


@pytest.fixture(scope="session")
def smallest() -> Architecture:
    """The quickstart's policy with one narrow layer."""
    architecture = load_config(QUICKSTART).policy.architecture
    assert architecture is not None
    return dataclasses.replace(
        architecture, width=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, mlp_width=32
    )


@pytest.fixture(scope="session")
def prepare_small_world() -> Callable[[Config], None]:
    """`prepare_world` with a tenth of the questions: every start of a run reads all, and a cold start answers all."""

    def prepare(config: Config) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(world, "NUM_TRAIN", 300)
            patch.setattr(world, "NUM_HELD_OUT", 30)
            prepare_world(config)

    return prepare


@pytest.fixture(scope="session")
def tiny(
    tmp_path_factory: pytest.TempPathFactory,
    short_quickstart: Callable[[Path], Config],
    smallest: Architecture,
    prepare_small_world: Callable[[Config], None],
) -> Config:
    """The smallest run there is, with its data: a cold start of a step and two steps of APPO, each saved."""
    folder = tmp_path_factory.mktemp("tiny")
    c = short_quickstart(folder)
    config = dataclasses.replace(
        c,
        run_dir=str(folder / "run"),
        steps=2,
        prompts_per_step=2,
        policy=dataclasses.replace(c.policy, architecture=smallest),
        rollout=dataclasses.replace(
            c.rollout, num_initial=2, budget=4, max_response_tokens=32, max_result_tokens=16, decode_rows=8
        ),
        branching=dataclasses.replace(c.branching, num_branch_points=1),
        sft=dataclasses.replace(c.sft, steps=1, batch_size=2),
        eval=dataclasses.replace(c.eval, num_prompts=2),
    )
    check(config)
    prepare_small_world(config)
    return config


@pytest.fixture
def one_of() -> Callable[[int, int], dict[str, str]]:
    """Variables by which process `i` of `hosts` on this machine finds the others, as Open MPI would set them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"

    def variables(i: int, hosts: int) -> dict[str, str]:
        return {
            "APPO_DISTRIBUTED": "1", "JAX_COORDINATOR_ADDRESS": address, "OMPI_MCA_orte_hnp_uri": "0.0;tcp://127.0.0.1:1",
            "OMPI_COMM_WORLD_SIZE": str(hosts), "OMPI_COMM_WORLD_RANK": str(i), "OMPI_COMM_WORLD_LOCAL_RANK": "0",
        }  # fmt: skip

    return variables


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data sets (gsm8k/, hotpotqa/, ...); tests that need it are skipped without APPO_JAX_DATA."""
    folder = os.environ.get("APPO_JAX_DATA")
    if not folder:
        pytest.skip("APPO_JAX_DATA does not name the folder of the data sets")
    return Path(folder)
