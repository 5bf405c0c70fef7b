"""Meshes: errors name the axes that cannot be split; eight devices compute the same numbers as one."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from appo_jax.config import Architecture, Config, MeshConfig, OptimizerConfig, PolicyConfig
from appo_jax.config_io import check
from appo_jax.errors import ConfigError
from appo_jax.policy.sharding import generating_architecture, make_mesh, param_shardings, partition_spec

TESTS = Path(__file__).parents[1]
ARCH = Architecture(96, 32, 2, 4, 2, 8, 48)


# The bounds of decoding hold for programs as users compile them. The others need no optimizations.
@pytest.mark.timeout(480)
@pytest.mark.parametrize(
    ("file", "optimized", "which"),
    [
        ("policy/train_on_eight_devices.py", False, "not long"),
        ("rollout/decode_on_eight_devices.py", True, "not long"),
        pytest.param("rollout/decode_on_eight_devices.py", True, "long", marks=pytest.mark.long),
    ],
)
def test_on_eight_devices(file: str, optimized: bool, which: str) -> None:
    flags = os.environ.get("XLA_FLAGS", "") if not optimized else ""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {flags}", "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0" if optimized else "1",
    }  # fmt: skip
    options = ["-q", "-x", "-p", "no:cacheprovider", "--durations=8", "-m", which]
    command = [sys.executable, "-m", "pytest", *options, str(TESTS / file)]
    done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout


def abstract_mesh(data: int, fsdp: int, tensor: int) -> AbstractMesh:
    return AbstractMesh((data, fsdp, tensor), ("data", "fsdp", "tensor"))


def test_an_axis_that_cannot_be_split_is_named() -> None:
    with pytest.raises(ConfigError) as error:
        param_shardings(ARCH, abstract_mesh(1, 3, 4), "train")
    lines = str(error.value).splitlines()
    assert (
        "- embed [V, D] = [96, 32]: axis D = 32 cannot be split over mesh.fsdp = 3; set mesh.fsdp to a divisor of 32"
        in lines
    )
    assert any("layers.0.k [D, K, E] = [32, 2, 8]: axis" in line for line in lines)
    with pytest.raises(
        ConfigError, match=r"axis K = 2 cannot be split over mesh\.tensor = 3; .* a divisor or a multiple of 2"
    ):
        param_shardings(dataclasses.replace(ARCH, num_heads=6), abstract_mesh(1, 1, 3), "generate")


def test_two_axes_on_one_mesh_axis_collide() -> None:
    rules = {"D": "tensor", "F": "tensor"}
    with pytest.raises(ConfigError, match=r"gate \[D, F\] = \[32, 48\]: axes D and F are both on mesh axis 'tensor'"):
        partition_spec("gate", "DF", (32, 48), rules, abstract_mesh(1, 1, 2))


def test_layouts() -> None:
    mesh: Any = abstract_mesh(2, 2, 2)
    train, generate = (param_shardings(ARCH, mesh, layout) for layout in ("train", "generate"))
    assert train["layers"][0]["q"].spec == PartitionSpec("fsdp", "tensor")
    assert generate["layers"][0]["q"].spec == PartitionSpec(None, "tensor")
    assert train["layers"][1]["down"].spec == PartitionSpec("tensor", "fsdp")
    assert generate["layers"][1]["attn_norm"].spec == PartitionSpec()
    assert train["layers"][0]["gate"].spec == PartitionSpec("fsdp", "tensor")
    assert generate["layers"][0]["gate"].spec == PartitionSpec(None, ("tensor", "fsdp"))
    assert generate["layers"][0]["down"].spec == PartitionSpec(("tensor", "fsdp"))
    assert generate["embed"].spec == PartitionSpec(("tensor", "fsdp"))
    odd = dataclasses.replace(ARCH, mlp_width=50)  # tensor × fsdp does not divide it
    assert param_shardings(odd, mesh, "generate")["layers"][0]["gate"].spec == PartitionSpec(None, "tensor")


def test_fewer_key_value_heads_than_tensor_places() -> None:
    """In training, key/value heads are not split over tensor. In generation, each is repeated for every device that uses it."""
    mesh: Any = abstract_mesh(1, 2, 4)
    assert param_shardings(ARCH, mesh, "train")["layers"][0]["k"].spec == PartitionSpec("fsdp")
    assert generating_architecture(ARCH, mesh).num_kv_heads == 4
    assert generating_architecture(ARCH, abstract_mesh(4, 1, 2)) == ARCH  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(2, 3, 1), r"2 × 3 × 1 = 6, but there are 1 devices \(.*mesh\.fsdp = 1"),
        (MeshConfig(1, 1, 1, slices=2), r"mesh\.slices = 2, but the 1 devices form 1"),
    ],
)
def test_a_mesh_that_is_not_the_machine(config: MeshConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_mesh(config, jax.devices()[:1])


def test_rows_that_cannot_be_split_are_named() -> None:
    policy = PolicyConfig(architecture=ARCH, tokenizer="x")
    with pytest.raises(ConfigError, match=r"optimizer\.micro_batch = 4 rows cannot be split over"):
        check(Config(policy=policy, mesh=MeshConfig(data=3), optimizer=OptimizerConfig(micro_batch=4)))
    with pytest.raises(ConfigError, match=r"mesh\.slices = 2 does not divide mesh\.data = 1"):
        check(Config(policy=policy, mesh=MeshConfig(slices=2)))
