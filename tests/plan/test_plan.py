"""What `appo-jax plan` says, without the TPU compiler: reading compiled programs, the verdict's arithmetic, errors."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from rich.console import Console

from appo_jax.algorithms import make_algorithm
from appo_jax.cli import main
from appo_jax.config import LoRAConfig, MeshConfig, OptimizerConfig
from appo_jax.config_io import load_config, with_fields
from appo_jax.data.pipeline import TraceBatch
from appo_jax.errors import ConfigError, PlanError
from appo_jax.plan import compiler, hlo, programs, report
from appo_jax.plan.abstract import Arrays, in_all
from appo_jax.plan.counts import count
from appo_jax.plan.lengths import Lengths, RolloutLengths
from appo_jax.plan.network import Network
from appo_jax.plan.topology import CHIPS, GIB, Chip, parse_slice
from appo_jax.policy.adapters import abstract_adapters
from appo_jax.policy.architecture import architecture_of
from appo_jax.policy.parameters import abstract_params
from appo_jax.policy.sharding import make_mesh, use_mesh
from appo_jax.rollout.shapes import Shapes
from appo_jax.sft import to_train_batch

ROOT = Path(__file__).parents[2]
PAPER = ("qwen2_5_7b_reasoning", "llama3_1_8b_reasoning", "qwen3_8b_deepsearch", "qwen3_14b_deepsearch")
MIB = 2**20

# A matrix product split over its contraction (all-reduce), its result gathered (all-gather), five times over in a scan.
ON_EIGHT = """
import json, os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from appo_jax.plan import hlo

mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
def put(*axes): return NamedSharding(mesh, P(*axes))
def read(f, *args): return hlo.read(jax.jit(f).lower(*args).compile().as_text())
a = jax.ShapeDtypeStruct((128, 256), jnp.float32, sharding=put(None, "x"))
b = jax.ShapeDtypeStruct((256, 64), jnp.float32, sharding=put("x", None))
g = jax.ShapeDtypeStruct((1024, 32), jnp.float32, sharding=put("x", None))

def five(a, b):
    def body(c, _):
        return jax.lax.with_sharding_constraint(jnp.sin(c) @ b @ jnp.ones((64, 256)), put(None, "x")), None
    return jax.lax.scan(body, a, None, length=5)[0]

found = {
    "reduce": read(lambda a, b: jax.lax.with_sharding_constraint(a @ b, put()), a, b),
    "gather": read(lambda g: jax.lax.with_sharding_constraint(g * 2, put()), g),
    "loop": read(five, a, b),
}
found = {name: [(c.kind, [len(g) for g in c.groups], c.size, c.times) for c in moved.collectives] for name, moved in found.items()}
print(json.dumps(found))
"""


def test_collectives_of_a_compiled_program_on_eight_devices():
    done = subprocess.run(
        [sys.executable, "-c", ON_EIGHT], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=120
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["reduce"] == [["all-reduce", [8], 128 * 64 * 4, 1]]
    assert found["gather"] == [["all-gather", [8], 1024 * 32 * 4, 1]]
    assert ["all-reduce", [8], 5 * 128 * 64 * 4, 5] in found["loop"]


def test_loops_count_as_often_as_they_run():
    def scan(x, weights):
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, weights)[0]

    x, weights = jax.ShapeDtypeStruct((32, 64), jnp.float32), jax.ShapeDtypeStruct((7, 64, 64), jnp.float32)
    one = 2 * 32 * 64 * 64
    jaxpr = jax.make_jaxpr(scan)(x, weights).jaxpr
    assert hlo.matmul_flops(jaxpr) == 7 * one
    assert hlo.matmul_flops(jaxpr, loops=False) == one
    hbm = hlo.read(jax.jit(scan).lower(x, weights).compile().as_text()).hbm
    # In every pass a weight is read, or taken out and then read; the rows are read and written by the product and by tanh.
    rows, weight = 4 * 32 * 64, 4 * 64 * 64
    assert 7 * (weight + 2 * rows) <= hbm <= 7 * (3 * weight + 5 * rows)


# As the TPU compiler writes it: a weight is fetched in two halves into memory S(1), the cache in HBM is written in place.
TPU_TEXT = """HloModule jit_step, is_scheduled=true

%in_place (c: bf16[16,1024,128], i: s32[16], u: bf16[16,128]) -> bf16[16,1024,128] {
  %c = bf16[16,1024,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %i = s32[16]{0:T(128)S(1)} parameter(1)
  %u = bf16[16,128]{1,0:T(8,128)(2,1)S(1)} parameter(2)
  ROOT %s = bf16[16,1024,128]{2,1,0:T(8,128)(2,1)} scatter(%c, %i, %u), to_apply=%second
}

%product (x: bf16[16,512], w: bf16[512,512]) -> bf16[16,512] {
  %x = bf16[16,512]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %w = bf16[512,512]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %y = bf16[16,512]{1,0:T(8,128)(2,1)S(1)} convolution(%x, %w), dim_labels=bf_io->bf
}

%look_up (table: f32[1000,512], i: s32[16]) -> bf16[16,512] {
  %table = f32[1000,512]{1,0:T(8,128)} parameter(0)
  %i.1 = s32[16]{0:T(128)S(1)} parameter(1)
  %g = f32[16,512]{1,0:T(8,128)} gather(%table, %i.1), offset_dims={1}
  ROOT %h = bf16[16,512]{1,0:T(8,128)(2,1)S(1)} convert(%g)
}

ENTRY %main (table: f32[1000,512], w: bf16[512,512], cache: bf16[16,1024,128], at: s32[16], new: bf16[16,128]) -> bf16[16,512] {
  %table.2 = f32[1000,512]{1,0:T(8,128)} parameter(0)
  %w.2 = bf16[512,512]{1,0:T(8,128)(2,1)} parameter(1)
  %cache = bf16[16,1024,128]{2,1,0:T(8,128)(2,1)} parameter(2)
  %at = s32[16]{0:T(128)S(1)} parameter(3)
  %new = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(4)
  %f = ((bf16[512,512]{1,0:T(8,128)(2,1)}), bf16[256,512]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%w.2), slice={}
  %f.1 = ((bf16[512,512]{1,0:T(8,128)(2,1)}), bf16[256,512]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%w.2), slice={}
  %n = (bf16[16,128]{1,0:T(8,128)(2,1)S(1)}, bf16[16,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%new)
  %d = bf16[256,512]{1,0:T(8,128)(2,1)S(1)} slice-done(%f)
  %d.1 = bf16[256,512]{1,0:T(8,128)(2,1)S(1)} slice-done(%f.1)
  %n.1 = bf16[16,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%n)
  %whole = bf16[512,512]{1,0:T(8,128)(2,1)S(1)} custom-call(%d, %d.1), custom_call_target="ConcatBitcast"
  %rows = bf16[16,512]{1,0:T(8,128)(2,1)S(1)} fusion(%table.2, %at), kind=kCustom, calls=%look_up
  %cache.1 = bf16[16,1024,128]{2,1,0:T(8,128)(2,1)} fusion(%cache, %at, %n.1), kind=kCustom, calls=%in_place
  ROOT %out = bf16[16,512]{1,0:T(8,128)(2,1)S(1)} fusion(%rows, %whole), kind=kOutput, calls=%product
}
"""


def test_what_a_tpu_fetches_ahead_is_read_from_hbm_once():
    weight, new, rows = 2 * 512 * 512, 2 * 16 * 128, 4 * 16 * 512
    flags = 2 * 4  # of the two fetches
    # The weight by its fetches, the new keys by theirs and into the cache, the rows of the table.
    assert hlo.read(TPU_TEXT).hbm == weight + flags + new + new + rows


TWO_VIEWS = """HloModule jit_step, is_scheduled=true

%two_slices (p: f32[64,128], i: s32[]) -> f32[2,128] {
  %p = f32[64,128]{1,0} parameter(0)
  %i = s32[]{S(2)} parameter(1)
  %b = f32[8192]{0} bitcast(%p)
  %b.1 = f32[1,64,128]{2,1,0} bitcast(%p)
  %s = f32[128]{0} dynamic-slice(%b, %i), dynamic_slice_sizes={128}
  %s.1 = f32[1,1,128]{2,1,0} dynamic-slice(%b.1, %i, %i, %i), dynamic_slice_sizes={1,1,128}
  ROOT %sum = f32[2,128]{1,0} custom-call(%s, %s.1)
}

ENTRY %main (x: f32[64,128], i: s32[]) -> f32[2,128] {
  %x = f32[64,128]{1,0} parameter(0)
  %i = s32[]{S(2)} parameter(1)
  ROOT %out = f32[2,128]{1,0} fusion(%x, %i), kind=kLoop, calls=%two_slices
}
"""


def test_slices_of_two_views_of_one_array_are_all_that_is_read():
    assert hlo.read(TWO_VIEWS).hbm == 2 * 4 * 128 + 4 * 2 * 128


# A loop over layers as the TPU compiler writes it: the weight is sliced out of the stack in a fusion inside that of its product.
STACKED = """HloModule jit_step, is_scheduled=true

%one_layer (w: bf16[36,64,128], layer: s32[]) -> bf16[64,128] {
  %w = bf16[36,64,128]{2,1,0} parameter(0)
  %layer = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %slice = bf16[1,64,128]{2,1,0} dynamic-slice(%w, %layer, %zero, %zero), dynamic_slice_sizes={1,64,128}
  ROOT %squeezed = bf16[64,128]{1,0} bitcast(%slice)
}

%product (x: bf16[16,64], w.1: bf16[36,64,128], layer.1: s32[]) -> bf16[16,128] {
  %x = bf16[16,64]{1,0} parameter(0)
  %w.1 = bf16[36,64,128]{2,1,0} parameter(1)
  %layer.1 = s32[]{:T(128)} parameter(2)
  %weight = bf16[64,128]{1,0} fusion(%w.1, %layer.1), kind=kLoop, calls=%one_layer
  ROOT %dot = bf16[16,128]{1,0} convolution(%x, %weight), dim_labels=bf_io->bf
}

ENTRY %main (x.1: bf16[16,64], w.2: bf16[36,64,128], layer.2: s32[]{S(2)}) -> bf16[16,128] {
  %x.1 = bf16[16,64]{1,0} parameter(0)
  %w.2 = bf16[36,64,128]{2,1,0} parameter(1)
  %layer.2 = s32[]{S(2)} parameter(2)
  ROOT %out = bf16[16,128]{1,0} fusion(%x.1, %w.2, %layer.2), kind=kOutput, calls=%product
}
"""


def test_of_stacked_weights_one_layer_is_read():
    scalar = 4  # the index of the layer, as the fusion's parameter
    assert hlo.read(STACKED).hbm == 2 * (16 * 64 + 64 * 128 + 16 * 128) + scalar


KERNEL = """HloModule jit_step, is_scheduled=true

ENTRY %main (q: bf16[4,2,16,128], k: bf16[4,2,128,1024], v: bf16[4,2,1024,128]) -> f32[4,2,16,128] {
  %q = bf16[4,2,16,128]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[4,2,128,1024]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  %v = bf16[4,2,1024,128]{3,2,1,0:T(8,128)(2,1)} parameter(2)
  ROOT %seen_suffix.3 = f32[4,2,16,128]{3,2,1,0:T(8,128)} custom-call(%q, %k, %v), custom_call_target="tpu_custom_call"
}
"""


def test_a_kernel_reads_what_is_seen_of_its_caches():
    q, cache, out = 2 * 4 * 2 * 16 * 128, 2 * 4 * 2 * 128 * 1024, 4 * 4 * 2 * 16 * 128
    assert hlo.read(KERNEL).hbm == q + 2 * cache + out
    assert hlo.read(KERNEL, 1, {"seen_prefix": 0.5, "seen_suffix": 0.25}).hbm == q + 2 * cache / 4 + out


def test_flops_of_the_backward_pass_and_of_what_remat_repeats():
    w = jnp.ones((16, 16))

    def loss(w, x):
        return jnp.tanh(x @ w).sum()

    x = jnp.ones((8, 16))
    one = 2 * 8 * 16 * 16
    assert hlo.matmul_flops(jax.make_jaxpr(loss)(w, x).jaxpr) == one
    assert hlo.matmul_flops(jax.make_jaxpr(jax.grad(loss))(w, x).jaxpr) == 2 * one  # forward, and dw
    again = jax.make_jaxpr(jax.grad(jax.checkpoint(loss)))(w, x).jaxpr
    assert hlo.matmul_flops(again) == 3 * one or hlo.matmul_flops(again) == 2 * one


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("f32[8,16]{1,0}", 512),
        ("bf16[4,8,128]{2,1,0:T(8,128)(2,1)S(1)}", 8192),
        ("(f32[2]{0}, /*index=1*/pred[3]{0}, u32[])", 8 + 3 + 4),
        ("s4[10]{0}", 5),
        ("f8e4m3fn[6]{0}", 6),
        ("token[]", 0),
    ],
)
def test_bytes_of_shapes(shape, expected):
    assert hlo.shape_bytes(shape) == expected


ALONE = Network(CHIPS["v5e"], (1,), (False,), ((0,),))  # one device


def need(name: str = "train", peak: float = 0.0, **fields) -> report.Need:
    zero = {f.name: 0 for f in dataclasses.fields(report.Need)} | {"collectives": {}, "counted": "", "fields": "a.b"}
    return report.Need(**(zero | {"name": name, "peak": peak, "times": 1} | fields))


CHIP = Chip(flops=100.0, hbm_bandwidth=10.0, link_bandwidth=2.0, dcn_bandwidth=1.0, hbm=16 * GIB)


def test_the_roofline_is_the_slowest_of_the_three():
    assert need(flops=300, traffic=10, collectives={"all-gather": report.Sent(1, 0.5)}).seconds(CHIP) == 3
    assert need(flops=300, traffic=50, collectives={"all-gather": report.Sent(1, 0.5)}).bound(CHIP) == "memory"
    slow = need(
        flops=300,
        traffic=50,
        collectives={"all-gather fsdp": report.Sent(6, 3), "all-reduce tensor": report.Sent(2, 4)},
    )
    assert (slow.seconds(CHIP), slow.bound(CHIP)) == (7, "network")
    plan = report.Plan("v5e:2x2", 4, CHIP, (need(flops=300, times=2), need(traffic=20, times=10)))
    assert plan.step_s == 2 * 3 + 10 * 2
    assert plan.dollars(1.8) == pytest.approx(26 / 3600 * 4 * 1.8)


def test_looks_of_the_host_count():
    looked_at = need(traffic=10, times=64, looks=64 / 32)
    assert looked_at.step_s(CHIP) == pytest.approx(64 * 1 + 2 * report.HOST_LOOK_S)


def test_the_table_names_the_collectives_that_cost_the_most():
    sent = {"all-reduce tensor": report.Sent(2e6, 1e-3), "all-gather fsdp": report.Sent(30e6, 2e-3)}
    plan = report.Plan("v5e:2x2", 4, CHIP, (need(collectives=sent | {"all-gather data": report.Sent(1, 1e-9)}),))
    assert "all-gather fsdp 30, 2.00, all-reduce tensor 2, 1.00 " in printed(plan, 200, False)
    assert plan.to_json()["needs"][0]["collectives"]["all-gather fsdp"] == {"size": 30e6, "seconds": 2e-3}


def test_the_verdict_names_what_is_left_or_what_to_lower():
    fits = report.Plan("v5e:2x2", 4, CHIP, (need("train", 12 * GIB), need("score", 4 * GIB)))
    assert fits.fits
    assert fits.verdict() == "fits v5e:2x2: 12.00 of 16.00 GiB per chip (train); 4.00 GiB left (25%)"
    over = report.Plan("v5e:2x2", 4, CHIP, (need("train", 18 * GIB), need("score", 4 * GIB)))
    assert not over.fits
    assert over.verdict() == (
        "does not fit v5e:2x2: 18.00 of 16.00 GiB per chip (train), 2.00 GiB too much. "
        "train: lower a.b, or raise mesh.fsdp or mesh.tensor"
    )
    assert json.loads(json.dumps(over.to_json()))["fits"] is False
    half = report.Plan("tpu7x:2x2x1", 4, CHIPS["tpu7x"], (need("train", GIB),))  # a chip is two devices
    assert "1.00 of 94.74 GiB per device (train)" in half.verdict()
    assert "memory per device of tpu7x:2x2x1, 4 chips" in printed(half, 200, True)
    assert "chip (" not in half.verdict()


@pytest.mark.parametrize(
    ("fields", "kept", "advice"),
    [
        ("optimizer.micro_batch", 3, "lower optimizer.micro_batch, or raise mesh.fsdp or mesh.tensor"),
        ("", 15, "raise mesh.fsdp or mesh.tensor"),
        ("a.b, c.d", 16, "lower a.b, c.d, or raise mesh.fsdp or mesh.tensor"),
        ("a.b", 17, "raise mesh.fsdp or mesh.tensor: weights and optimizer state alone take 17.00 GiB"),
    ],
)
def test_more_devices_along_an_axis_hold_less_each(fields, kept, advice):
    """Rows and lengths are not to blame where the weights alone are too much."""
    over = report.Plan("v5e:2x2", 4, CHIP, (need("train", 18 * GIB, fields=fields, kept=kept * GIB),))
    assert over.verdict().endswith(f"train: {advice}")


def test_programs_that_need_the_same_share_an_advice():
    needs = (need("prefill", 18 * GIB), need("score", 19 * GIB), need("train", 20 * GIB, fields="c.d"))
    advice = "2.00 GiB too much. prefill and score: lower a.b, or raise mesh.fsdp or mesh.tensor; train: lower c.d, or"
    assert advice.replace("2.00", "4.00") in report.Plan("v5e:2x2", 4, CHIP, needs).verdict()


def printed(plan, width, terminal, **more):
    out = io.StringIO()
    report.show(plan, Console(file=out, width=width, force_terminal=terminal, color_system=None), more)
    return out.getvalue()


def test_a_program_that_was_refused_has_no_roofline():
    """Nothing is known of its work: neither it nor the step gets a time."""
    plan = report.Plan("v5e:2x2", 4, CHIP, (need("train", 18 * GIB, refused=True), need("score", GIB, flops=300)))
    assert plan.step_s is None
    text = printed(plan, 200, False, dollars_a_step=plan.dollars(1.2))
    assert "dollars_a_step: not known" in text
    assert "not known, a program does not fit" in text
    row = next(line for line in text.splitlines() if "train" in line and "does not fit" in line)
    assert "0.0" not in row
    record = plan.to_json()
    assert (record["step_s"], record["needs"][0]["seconds"], record["needs"][1]["seconds"]) == (None, None, 3.0)


def test_a_program_that_was_refused_does_not_fit():
    """Though the figures in the compiler's message, of its temporaries alone, are less than the chip has."""
    plan = report.Plan("v5e:2x2", 4, CHIP, (need("append", 8 * GIB, refused=True), need("train", 12 * GIB)))
    assert not plan.fits
    assert plan.verdict() == (
        "does not fit v5e:2x2: 12.00 of 16.00 GiB per chip (train); the compiler refused append for lack of memory. "
        "append: lower a.b, or raise mesh.fsdp or mesh.tensor"
    )


def test_what_a_checkpoint_takes(tiny):
    """Float32 weights and both moments of Adam, and two counters; written by all hosts at 200 MB/s."""
    mesh = make_mesh(tiny.mesh)
    with use_mesh(mesh):
        arrays = Arrays(tiny, tiny.policy.architecture, mesh)
        parameters = sum(x.size for x in jax.tree.leaves(arrays.state().params))
        assert 12 * parameters <= in_all(arrays.state()) <= 12 * parameters + 64
    plan = report.Plan("v5e:8x8", 64, CHIP, (need("train", GIB),), hosts=16, checkpoint=91_400_000_000)
    assert plan.storage() == "checkpoint: 91.4 GB, 5.7 GB a host (16), 29 s at 200 MB/s a host"
    assert plan.storage() in printed(plan, 60, False)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_tables_fold_to_a_terminal_and_are_whole_in_a_file(width):
    numbers = {"flops": 1348.147e12, "traffic": 22.11e9, "arguments": 15.25 * GIB, "temporaries": 3.5 * GIB}
    needs = (need("decode, branches", 18.75 * GIB, counted="3 × 64 rows × 4096 tokens", **numbers),)
    plan = report.Plan("v5e:2x2", 4, CHIPS["v5e"], needs)
    lines = printed(plan, width, True)
    for number in ("1348.147", "22.11", "15.25", "3.50", "18.75", "-3.00"):
        assert number in lines, lines
    assert "…" not in lines
    assert max(map(len, printed(plan, width, True).splitlines())) <= max(width, len(plan.verdict()))
    whole = printed(plan, width, False)
    assert any("decode, branches" in line and "3 × 64 rows × 4096 tokens" in line for line in whole.splitlines())


@pytest.mark.parametrize(
    ("name", "topology", "chips"),
    [
        ("v5litepod-64", "v5e:8x8", 64),
        ("v5litepod-1", "v5e:1x1", 1),
        ("v5e-16", "v5e:4x4", 16),
        ("v6e-256", "v6e:16x16", 256),
        ("v5p-128", "v5p:4x4x4", 64),  # the cloud counts TensorCores, two a chip
        ("v5p-8", "v5p:2x2x1", 4),
        ("v4-8", "v4:2x2x1", 4),
        ("tpu7x-128", "tpu7x:4x4x4", 64),
        ("v5p:4x4x8", "v5p:4x4x8", 128),
    ],
)
def test_slices_by_their_names(name, topology, chips):
    found = parse_slice(name)
    assert (found.topology, found.num_chips) == (topology, chips)
    assert found.chip == CHIPS[topology.split(":")[0]]


def test_a_size_that_the_cloud_does_not_rent():
    with pytest.raises(
        ConfigError, match=r"v5litepod-60: .* expected one of v5litepod-1, v5litepod-4, .*v5litepod-256"
    ):
        parse_slice("v5litepod-60")


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G of "
         "15.75G hbm. Exceeded hbm capacity by 4.75G.", 20.5),
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (512.00M) exceeds "
         "available HBM (0.25G).", 0.5),
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (2.00T) exceeds "
         "available HBM (94.74G).", 2048),
        ("INVALID_ARGUMENT: something else", None),
    ],
)  # fmt: skip
def test_what_the_compiler_refused_for_lack_of_memory(message, gib):
    assert compiler.hbm_of_refusal(message) == (None if gib is None else gib * GIB)


@pytest.mark.parametrize("topology", ["v5p", "v9:2x2", "v5e:8", "v9-128", "v3-8"])
def test_a_topology_that_is_none(topology):
    with pytest.raises(ConfigError, match=r"expected CHIP:AxB.* or a slice as the cloud names it"):
        parse_slice(topology)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="the TPU compiler is installed")
def test_a_missing_compiler_is_said(capsys):
    config = ROOT / "configs/qwen2_5_7b_reasoning.py"
    with pytest.raises(PlanError, match=r"pip install 'jax\[tpu\]'"):
        compiler.compiler_for("v5e:8x8")
    assert main(["plan", "--config", str(config), "--topology", "v5e:8x8"]) == 1
    assert "libtpu" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed")
def test_a_config_that_does_not_fit_a_slice(tmp_path):
    """The TPU compiler itself refuses its programs: exit code 1, what would help, and no time of what was refused. So do two plans
    that run at the same time."""
    command = [
        sys.executable, "-m", "appo_jax", "plan", "--config", str(ROOT / "configs/quickstart.py"), "--topology",
        "v5litepod-1", "--policy.architecture.vocab-size", "2000000", "--policy.architecture.width", "2048",
        "--policy.architecture.num-layers", "1",
    ]  # fmt: skip
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for process in both:
        printed, told = process.communicate(timeout=600)
        last = told.splitlines()[-1]
        assert process.returncode == 1, told
        assert last.startswith("appo-jax plan: does not fit v5e:1x1: ")
        assert "raise mesh.fsdp or mesh.tensor: weights and optimizer state alone take " in last
        assert "a step's roofline: not known, a program does not fit" in printed
        assert "does not fit" in next(line for line in printed.splitlines() if "mini-batches" in line)


TWICE = """
import jax
from appo_jax.plan.compiler import compiler_for

device = compiler_for("v5e:1x1").devices[0]
x = jax.ShapeDtypeStruct((8, 128), "float32", sharding=jax.sharding.SingleDeviceSharding(device))
for _ in range(2):
    jax.clear_caches()
    jax.jit(lambda x: x @ x.T).lower(x).compile()
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed")
def test_a_program_for_a_slice_is_not_put_into_the_cache_from_which_it_could_not_be_read(tmp_path):
    """With a cache, as `make` has one: a second plan warned of every program."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", TWICE], capture_output=True, text=True, env=os.environ | cache, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "Error reading persistent compilation cache" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_topology_must_be_given(capsys):
    assert main(["plan", "--config", str(ROOT / "configs/qwen3_8b_deepsearch.py")]) == 2
    assert "--topology" in capsys.readouterr().err


@pytest.mark.parametrize("given", [("--price", "-1"), ("--price", "nan"), ("--search", "-5"), ("--search", "nan")])
def test_price_and_minutes_are_no_less_than_0(given, capsys):
    config = str(ROOT / "configs/qwen3_8b_deepsearch.py")
    assert main(["plan", "--config", config, "--topology", "v5e:2x2", *given]) == 2
    assert f"{given[0]} {float(given[1])}: expected 0 or more" in capsys.readouterr().err


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_settings(name):
    config = load_config(ROOT / f"configs/{name}.py")
    r, b = config.rollout, config.branching
    assert (config.prompts_per_step, config.prompts_per_minibatch, r.budget, r.num_initial) == (128, 16, 16, 4)
    assert (b.num_branch_points, b.num_loops, b.tau, b.clip_low, b.clip_high) == (3, 1, 32, 1, 1.2)
    assert (config.advantage.future_weight, config.loss.kl_weight, config.optimizer.learning_rate) == (0.5, 0, 1e-6)
    assert r.max_response_tokens == (4096 if "reasoning" in name else 8192)
    assert config.tools.search.top_k == 10


# Parameters of the released models, in billions, as their model cards count them.
@pytest.mark.parametrize(("name", "billions"), list(zip(PAPER, (7.62, 8.03, 8.19, 14.77), strict=True)))
def test_the_architectures_have_the_released_sizes(name, billions):

    arch = load_config(ROOT / f"configs/{name}.py").policy.architecture
    count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(abstract_params(arch)))
    assert count / 1e9 == pytest.approx(billions, abs=0.006)


def test_programs_of_a_small_config_compile_and_are_counted():
    """On this machine's device: the programs are the run's own, so what they take and give must still agree."""
    config = load_config(ROOT / "configs/quickstart.py")
    arch = dataclasses.replace(config.policy.architecture, num_layers=1, vocab_size=64, width=32, mlp_width=32)
    config = dataclasses.replace(config, mesh=MeshConfig(), optimizer=OptimizerConfig(micro_batch=8))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    found = {p.name: p for p in programs.programs(config, arch, mesh)}
    assert list(found) == [
        "cold start", "reshard", "prefill, evaluation", "decode, evaluation", "append, evaluation", "prefill", "decode, initial",
        "score", "decode, branches", "append, initial", "append, branches", "train",
    ]  # fmt: skip
    # 16 prompts, 8 a mini-batch, N = 4, M = 16, B = 3, 112 tokens, 64 rows: 64 initial rollouts at once; 96 branches of
    # each of 2 mini-batches take 2 fills of 64 rows; 32 parents, the longest, go through the score in passes of a row of 408
    # slots, twice.
    assert found["decode, initial"].times == 112
    assert found["decode, branches"].times == 2 * 2 * 112
    # …, for log π_old and before branching
    assert found["score"].times == 2 * 2 * 11
    assert found["append, initial"].times == 16 * 4 * 5 / 8
    assert found["append, branches"].times == 16 * 12 * 5 / 8
    assert found["train"].times == 2 * 32 / 8
    for program in found.values():
        measured = compiler.measure(program, ALONE)
        assert measured.peak >= program.resident + measured.temporaries
        assert measured.flops > 0 or program.name == "reshard"
    params = sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: abstract_params(arch))))
    # Beside the float32 weights and two moments, what generates has its copy in bfloat16.
    kept = {name: program.kept / params for name, program in found.items() if name != "cold start"}
    assert kept == pytest.approx({name: 12 if name in ("reshard", "score", "train") else 14 for name in kept}, rel=2e-3)
    # Float32 weights and two moments. The caches of the generation exist before the first prompt is prefilled: keys and values
    # of 16 prompts and of 64 rows that add a token to their prompt's last one and what they sample, in bfloat16.
    tokens = 16 * config.rollout.max_prompt_tokens + 64 * (config.rollout.max_response_tokens + 1)
    caches = 2 * 2 * tokens * arch.num_kv_heads * arch.head_dim
    assert found["prefill"].resident == pytest.approx(12 * params + caches, abs=64 * 1024 * 2)
    assert caches > 2**20
    # An evaluation of 192 questions fills 64 rows, each with a prefix of its own, from passes of 64 prompts, of which two exist at
    # the same time. It is no part of a step.
    one = 2 * 2 * arch.num_kv_heads * arch.head_dim  # bytes of a token's keys and values
    prompts, responses = 64 * config.rollout.max_prompt_tokens, 64 * (config.rollout.max_response_tokens + 1)
    of_evaluation = 12 * params + one * (2 * prompts + responses)
    assert found["prefill, evaluation"].resident == pytest.approx(of_evaluation, abs=64 * 1024 * 2)
    assert found["decode, evaluation"].resident == pytest.approx(12 * params + one * prompts, abs=64)
    assert {program.times for name, program in found.items() if "evaluation" in name} == {0}


def test_a_config_without_tools_has_no_calls():
    config = load_config(ROOT / "configs/quickstart.py")
    without = dataclasses.replace(config, mesh=MeshConfig(), tools=dataclasses.replace(config.tools, enabled=()))
    counts = count(without, Shapes.of(make_algorithm(without)))
    assert [generation.appends for generation in counts.generations] == [0, 0]
    of_run = RolloutLengths(*[Lengths((20,), 3.0, 100.0, 50.0)] * 2)  # of a run with tools
    counts = count(without, Shapes.of(make_algorithm(without)), of_run)
    assert [generation.appends for generation in counts.generations] == [0, 0]
    assert sum(g.appends for g in count(config, Shapes.of(make_algorithm(config))).generations) == 40 + 120


class Device(SimpleNamespace):
    """A TPU that is not there, as the TPU compiler describes it."""

    def __hash__(self):
        return id(self)


def test_a_plan_for_one_chip_is_of_the_programs_of_a_tpu():
    """As on a mesh of several devices: with the kernels for TPUs, and with a loop over layers."""
    chip = Device(
        platform="tpu", device_kind="TPU v5 lite", num_cores=1, id=0, coords=(0, 0, 0), core_on_chip=0, slice_index=0,
        process_index=0, client=SimpleNamespace(process_index=lambda: 0),
    )  # fmt: skip
    config = load_config(ROOT / "configs/quickstart.py")
    arch = dataclasses.replace(config.policy.architecture, vocab_size=64, width=32, mlp_width=32)
    config = dataclasses.replace(config, mesh=MeshConfig())
    mesh = make_mesh(config.mesh, [chip])
    with use_mesh(mesh):
        found = {p.name: str(p.trace().jaxpr) for p in programs.programs(config, arch, mesh)}
    assert {name for name, text in found.items() if "pallas_call" not in text} == {"reshard"}
    assert found["prefill"].count("pallas_call") == 1  # of all layers
    here = make_mesh(config.mesh, jax.devices()[:1])
    with use_mesh(here):
        prefill = next(p for p in programs.programs(config, arch, here) if p.name == "prefill")
        assert "pallas_call" not in str(prefill.trace().jaxpr)


def test_a_program_changes_only_with_the_fields_that_it_names():
    """So a search compiles it again only if one of these has changed."""
    config = load_config(ROOT / "configs/quickstart.py")
    arch = dataclasses.replace(config.policy.architecture, num_layers=1, vocab_size=64, width=32, mlp_width=32)
    config = dataclasses.replace(config, mesh=MeshConfig(), optimizer=OptimizerConfig(micro_batch=8))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    changes = {"rollout.decode_rows": 32, "optimizer.micro_batch": 4, "optimizer.remat": "layers"}
    for i, program in enumerate(programs.programs(config, arch, mesh)):
        other = with_fields(config, {field: x for field, x in changes.items() if field not in program.depends_on})
        same = list(programs.programs(other, arch, mesh))[i]
        assert (same.name, same.resident) == (program.name, program.resident)
        assert str(same.trace().jaxpr) == str(program.trace().jaxpr), program.name


def test_an_error_of_the_compiler_names_the_program():
    """A program that calls a kernel which this machine's compiler does not have."""

    def trace():
        return jax.jit(lambda x: pl.pallas_call(lambda i, o: None, jax.ShapeDtypeStruct((8,), "float32"))(x)).trace(
            jax.ShapeDtypeStruct((8,), "float32")
        )

    program = programs.Program("decode, initial", trace, 1, "once", 0, 0, "rollout.decode_rows", ())
    with pytest.raises(
        PlanError, match=r"decode, initial: the compiler failed with ValueError: .*rollout\.decode_rows"
    ):
        compiler.measure(program, ALONE)


def test_the_cold_start_is_planned_and_trains_all_parameters(tmp_path):
    """Also if RL trains adapters. Its program is the one of `appo-jax sft`; a policy that comes from another run has none."""
    config = load_config(ROOT / "configs/quickstart.py")
    policy = dataclasses.replace(config.policy, lora=LoRAConfig(rank=2))
    sft = dataclasses.replace(config.sft, optimizer="adamw", batch_size=4, micro_batch=2, max_tokens=6)
    config = dataclasses.replace(config, policy=policy, sft=sft, mesh=MeshConfig())
    arch, mesh = architecture_of(policy), make_mesh(config.mesh, jax.devices()[:1])
    found = {p.name: p for p in programs.programs(config, arch, mesh)}
    params, adapters = (sum(x.size for x in jax.tree.leaves(of(arch))) for of in (abstract_params, abstract_adapters))
    assert found["cold start"].kept == pytest.approx(12 * params, abs=64)
    assert found["train"].kept < 3 * params
    assert found["cold start"].times == 0
    # Evaluations before RL read a bfloat16 copy of all parameters (and adapters), beside float32 weights and moments.
    assert found["decode, evaluation"].kept == pytest.approx(14 * params + 2 * adapters, rel=0.01)
    assert found["decode, initial"].kept < 3 * params
    (_, batch), _ = found["cold start"].trace().args_info
    row = np.zeros((4, 6), np.int32)
    real = to_train_batch(TraceBatch(row, row, row, row), at_once=2)
    assert [x.shape for x in jax.tree.leaves(batch)] == [np.shape(x) for x in jax.tree.leaves(real)]
    other = dataclasses.replace(config, init_from=str(tmp_path))
    found = {p.name: p for p in programs.programs(other, arch, mesh)}
    assert "cold start" not in found
    assert found["decode, evaluation"].kept == pytest.approx(6 * params + 2 * adapters, rel=0.01)  # without moments


def test_generations_that_differ_have_names_that_differ():
    """Two loops of branching fill the same rows, but hold different numbers of prefixes."""
    config = load_config(ROOT / "configs/quickstart.py")
    config = dataclasses.replace(
        config,
        prompts_per_step=16, prompts_per_minibatch=16, mesh=MeshConfig(),
        rollout=dataclasses.replace(config.rollout, num_initial=4, budget=64, decode_rows=192),
        branching=dataclasses.replace(config.branching, num_branch_points=3, num_loops=2),
    )  # fmt: skip
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    names = [p.name for p in programs.programs(config, config.policy.architecture, mesh)]
    assert len(set(names)) == len(names)
    assert {"decode, branches, 192 rows, 64 slots", "decode, branches, 192 rows, 128 slots"} <= set(names)
