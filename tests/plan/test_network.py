"""The time of collectives in a plan: closed forms on lines, rings and tori, and what is read from the text of a TPU program."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appo_jax.plan import hlo
from appo_jax.plan.network import HOP_S, Collective, Network, parse_groups
from appo_jax.plan.topology import CHIPS, parse_slice


def network(topology: str, **mesh: int) -> Network:
    """A slice whose devices are numbered row by row."""
    described = parse_slice(topology)
    places = tuple(itertools.product(*map(range, described.sides)))
    rings = tuple(map(described.is_ring, range(len(described.sides))))
    return Network(described.chip, described.sides, rings, places, mesh)


def along(net: Network, *axes: int) -> tuple[tuple[int, ...], ...]:
    """The groups of devices that differ on these axes of the torus alone."""
    numbers = np.arange(len(net.places)).reshape(net.sizes)
    kept = [axis for axis in range(len(net.sizes)) if axis not in axes]
    size = int(np.prod([net.sizes[axis] for axis in axes]))
    return tuple(map(tuple, numbers.transpose(*kept, *axes).reshape(-1, size).tolist()))


V = 1e9  # bytes


@pytest.mark.parametrize(
    ("topology", "axes", "links", "hops"),
    [
        ("v5e:8x8", (0,), 1, 7),  # the end of a line has one neighbour
        ("v5e:16x16", (0,), 2, 8),  # a ring: both neighbours, half way around
        ("v5e:8x16", (0, 1), 1 + 2, 7 + 8),
        ("v6e:8x8", (0, 1), 2, 14),  # the corner
        ("v5p:4x4x4", (2,), 2, 2),
        ("v5p:4x4x4", (1, 2), 4, 4),
        ("v5p:4x4x4", (0, 1, 2), 6, 6),
        ("v5p:2x4x4", (1, 2), 2, 6),  # no cube of 4 x 4 x 4: no rings
    ],
)
def test_a_group_has_the_links_of_the_axes_that_it_spans(topology, axes, links, hops):
    net = network(topology)
    groups, link = along(net, *axes), net.chip.link_bandwidth
    n = len(groups[0])
    gather = V * (n - 1) / n / (links * link)
    once = gather + hops * HOP_S
    expected = {"all-gather": once, "reduce-scatter": once, "all-reduce": 2 * once}
    for kind, seconds in expected.items():
        assert net.seconds(Collective(kind, groups, V, 1)) == pytest.approx(seconds, rel=1e-12)
    three = net.seconds(Collective("all-gather", groups, 3 * V, 3))
    assert three == pytest.approx(3 * expected["all-gather"], rel=1e-12)


def test_the_books_example():
    """Pop quiz 2 of chapter 3 gathers bfloat16[2048, 8192] over 4 devices in a row of a v5e 8x4: 3 hops of 8.4 MB. The book takes
    45 GB/s for a link, and finds 560 µs."""
    net = network("v5e:4x8")
    seconds = net.seconds(Collective("all-gather", along(net, 0), 2048 * 8192 * 2, 1))
    assert seconds == pytest.approx(3 * 8.4e6 / net.chip.link_bandwidth + 3e-6, rel=2e-3)
    assert seconds * net.chip.link_bandwidth / 45e9 == pytest.approx(560e-6, rel=1e-2)


def test_groups_that_use_the_same_links_share_them():
    """On v5e:8x8, fsdp = 16 and tensor = 4: a group of fsdp lies on the columns x and x + 4, so four groups cross the middle."""
    net = network("v5e:8x8", data=1, fsdp=16, tensor=4)
    columns = np.arange(64).reshape(2, 4, 8).transpose(1, 0, 2).reshape(4, 16)
    groups = tuple(map(tuple, columns.tolist()))
    seconds = net.seconds(Collective("all-gather", groups, V, 1))
    assert seconds == pytest.approx(V * 15 / 16 / (50e9 * (1 + 1 / 4)) + (4 + 7) * HOP_S, rel=1e-12)


def test_all_to_all_is_bound_by_the_links_between_the_halves():
    """On a ring, a quarter of an all-gather of the whole array (chapter 3), on a line half of it."""
    ring, line = network("v5e:16x16"), network("v5e:8x8")
    whole = V * 16
    seconds = ring.seconds(Collective("all-to-all", along(ring, 0), V, 1))
    assert seconds == pytest.approx(whole / 4 / (2 * 50e9) + 8 * HOP_S, rel=1e-12)
    seconds = line.seconds(Collective("all-to-all", along(line, 0), V, 1))
    assert seconds == pytest.approx(8 * V / 4 / 50e9 + 7 * HOP_S, rel=1e-12)


@pytest.mark.parametrize(
    ("topology", "shift", "load", "hops"),
    [
        ("v5p:4x4x4", 1, 1, 1),
        ("v5p:4x4x4", 2, 2, 2),  # two ways of two hops: both parts go the same way round
        ("v5e:8x8", 1, 1, 7),  # the last one's part goes back over all links, against the others'
        ("v5e:8x8", 4, 4, 4),
    ],
)
def test_a_permute_waits_for_its_busiest_link(topology, shift, load, hops):
    net = network(topology)
    pairs = tuple((row[i], row[(i + shift) % len(row)]) for row in along(net, 1) for i in range(len(row)))
    seconds = net.seconds(Collective("collective-permute", pairs, V, 1))
    assert seconds == pytest.approx(V * load / net.chip.link_bandwidth + hops * HOP_S, rel=1e-12)


@given(st.permutations(range(16)))
def test_no_permute_is_faster_than_its_cuts(targets):
    """What crosses the middle of a 4x4 slice must fit through the four links there, in each direction."""
    net = network("v5e:4x4")
    seconds = net.seconds(Collective("collective-permute", tuple(enumerate(targets)), V, 0))
    for axis in range(2):
        sides = [(net.places[s][axis] < 2, net.places[t][axis] < 2) for s, t in enumerate(targets)]
        for crossing in ((True, False), (False, True)):
            assert seconds >= sides.count(crossing) * V / 4 / net.chip.link_bandwidth - 1e-12


def test_between_slices_the_data_centre_network_counts():
    described = parse_slice("v5p:4x4x4")
    net = Network(described.chip, (4, 4, 4), (True,) * 3, tuple(itertools.product(range(4), repeat=3)), slices=4)
    assert net.num_devices == 256
    for kind, sent in (("all-reduce", 2 * 3 / 4), ("all-gather", 3), ("one-to-one", 1)):
        seconds = net.seconds(Collective(f"{kind} between slices", (), V, 1))
        assert seconds == pytest.approx(sent * V / 6.25e9)


def test_the_axes_of_the_mesh_name_a_collective():
    net = network("v5e:4x4", data=1, fsdp=4, tensor=4)
    assert net.name(Collective("all-gather", along(net, 0), V, 1)) == "all-gather fsdp"
    assert net.name(Collective("all-reduce", along(net, 0, 1), V, 1)) == "all-reduce fsdp×tensor"
    assert net.name(Collective("collective-permute", ((0, 1), (1, 0)), V, 1)) == "collective-permute tensor"


def test_one_device_sends_nothing():
    net = Network(CHIPS["v5e"], (1,), (False,), ((0,),))
    assert net.seconds(Collective("all-reduce", ((0,),), V, 5)) == 0
    assert net.seconds(Collective("all-reduce", (), V, 5)) == 0


# ---------------------------------------------------------------- the compiler's text


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=2,'b'=4] {'b'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh['a'=2,'b'=4] {'a'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=2,'b'=4] {'a','b'}", (tuple(range(8)),)),
        ("mesh['a'=2,'b'=4] {'b':(1)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['a'=2,'b'=4] {'b':(2)2}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("", ()),
    ],
)
def test_groups_in_every_notation_of_the_compiler(text, groups):
    assert parse_groups(text) == groups


# As the TPU compiler writes it: a scan of 28 layers without its number of iterations, in it a loop that counts by two, whose
# products go on with a gather that began before it; and a sum that is scattered.
LOOPS = """HloModule jit_step, is_scheduled=true

%all-reduce-scatter.1 (input: bf16[16,128]) -> bf16[4,128] {
  %input = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.5 = bf16[16,128]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=3, replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %dynamic-slice.1 = bf16[4,128]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.5, %zero, %zero), dynamic_slice_sizes={4,128}
}

%begin (part: bf16[64,128]) -> (bf16[64,128], bf16[256,128]) {
  %part = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[256,128]{1,0:T(8,128)(2,1)} all-gather(%part), channel_id=20, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %start = (bf16[64,128]{1,0:T(8,128)(2,1)}, bf16[256,128]{1,0:T(8,128)(2,1)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.7 (part.1: bf16[64,128], whole: bf16[256,128], x: bf16[8,128]) -> (bf16[8,128], bf16[64,128], bf16[256,128], bf16[256,128]) {
  %part.1 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %whole = bf16[256,128]{1,0:T(8,128)(2,1)} parameter(1)
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(2)
  %y = bf16[8,128]{1,0:T(8,128)(2,1)} negate(%x)
  %all-gather.2 = bf16[256,128]{1,0:T(8,128)(2,1)} all-gather(%part.1), channel_id=20, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %both = (bf16[8,128]{1,0}, bf16[64,128]{1,0}, bf16[256,128]{1,0}, bf16[256,128]{1,0}) tuple(%y, %part.1, %whole, %all-gather.2)
}

%end (part.2: bf16[64,128], whole.1: bf16[256,128]) -> bf16[256,128] {
  %part.2 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %whole.1 = bf16[256,128]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %all-gather.3 = bf16[256,128]{1,0:T(8,128)(2,1)} all-gather(%part.2), channel_id=20, replica_groups=[1,4]<=[4], dimensions={0}
}

%window (carried: (u32[], bf16[8,128], bf16[64,128], bf16[256,128])) -> (u32[], bf16[8,128], bf16[64,128], bf16[256,128]) {
  %carried = (u32[], bf16[8,128]{1,0}, bf16[64,128]{1,0}, bf16[256,128]{1,0}) parameter(0)
  %at = u32[]{:T(128)} get-tuple-element(%carried), index=0
  %x.1 = bf16[8,128]{1,0} get-tuple-element(%carried), index=1
  %part.3 = bf16[64,128]{1,0} get-tuple-element(%carried), index=2
  %whole.2 = bf16[256,128]{1,0} get-tuple-element(%carried), index=3
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%at, %two)
  %passed = bf16[8,128]{1,0} collective-permute(%x.1), channel_id=4, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %product = (bf16[8,128]{1,0}, bf16[64,128]{1,0}, bf16[256,128]{1,0}, bf16[256,128]{1,0}) fusion(%part.3, %whole.2, %passed), kind=kOutput, calls=%async_collective_fusion.7
  %y.1 = bf16[8,128]{1,0} get-tuple-element(%product), index=0
  %part.4 = bf16[64,128]{1,0} get-tuple-element(%product), index=1
  %whole.3 = bf16[256,128]{1,0} get-tuple-element(%product), index=3
  ROOT %out = (u32[], bf16[8,128]{1,0}, bf16[64,128]{1,0}, bf16[256,128]{1,0}) tuple(%next, %y.1, %part.4, %whole.3)
}

%window_goes_on (carried.1: (u32[], bf16[8,128], bf16[64,128], bf16[256,128])) -> pred[] {
  %carried.1 = (u32[], bf16[8,128]{1,0}, bf16[64,128]{1,0}, bf16[256,128]{1,0}) parameter(0)
  %eight = u32[]{:T(128)} constant(8), metadata={op_name="jit(step)/dot_general"}
  %at.1 = u32[]{:T(128)} get-tuple-element(%carried.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%at.1, %eight), direction=LT
}

%layer (of: (s32[], bf16[8,128], bf16[64,128], s32[])) -> (s32[], bf16[8,128], bf16[64,128], s32[]) {
  %of = (s32[], bf16[8,128]{1,0}, bf16[64,128]{1,0}, s32[]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%of), index=0
  %x.2 = bf16[8,128]{1,0} get-tuple-element(%of), index=1
  %part.5 = bf16[64,128]{1,0} get-tuple-element(%of), index=2
  %one = s32[]{:T(128)} get-tuple-element(%of), index=3
  %async-collective-start = (bf16[64,128]{1,0}, bf16[256,128]{1,0}) fusion(%part.5), kind=kCustom, calls=%begin
  %part.6 = bf16[64,128]{1,0} get-tuple-element(%async-collective-start), index=0
  %whole.4 = bf16[256,128]{1,0} get-tuple-element(%async-collective-start), index=1
  %zero.1 = u32[]{:T(128)} constant(0)
  %first = (u32[], bf16[8,128]{1,0}, bf16[64,128]{1,0}, bf16[256,128]{1,0}) tuple(%zero.1, %x.2, %part.6, %whole.4)
  %inner = (u32[], bf16[8,128]{1,0}, bf16[64,128]{1,0}, bf16[256,128]{1,0}) while(%first), condition=%window_goes_on, body=%window
  %part.7 = bf16[64,128]{1,0} get-tuple-element(%inner), index=2
  %whole.5 = bf16[256,128]{1,0} get-tuple-element(%inner), index=3
  %async-collective-done = bf16[256,128]{1,0} fusion(%part.7, %whole.5), kind=kCustom, calls=%end
  %some = bf16[16,128]{1,0} bitcast(%whole.5)
  %sum = bf16[4,128]{1,0} fusion(%some), kind=kCustom, calls=%all-reduce-scatter.1
  %y.2 = bf16[8,128]{1,0} get-tuple-element(%inner), index=1
  %i.1 = s32[]{:T(128)} add(%i, %one)
  ROOT %out.1 = (s32[], bf16[8,128]{1,0}, bf16[64,128]{1,0}, s32[]) tuple(%i.1, %y.2, %part.7, %one)
}

%more_layers (of.1: (s32[], bf16[8,128], bf16[64,128], s32[])) -> pred[] {
  %of.1 = (s32[], bf16[8,128]{1,0}, bf16[64,128]{1,0}, s32[]) parameter(0)
  %layers = s32[]{:T(128)} constant(28)
  %i.2 = s32[]{:T(128)} get-tuple-element(%of.1), index=0
  ROOT %less.1 = pred[]{:T(512)} compare(%i.2, %layers), direction=LT
}

ENTRY %main (x.3: bf16[8,128], w: bf16[64,128]) -> (s32[], bf16[8,128], bf16[64,128], s32[]) {
  %x.3 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %w = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(1)
  %zero.2 = s32[]{:T(128)} constant(0)
  %one.1 = s32[]{:T(128)} constant(1)
  %first.1 = (s32[], bf16[8,128]{1,0}, bf16[64,128]{1,0}, s32[]) tuple(%zero.2, %x.3, %w, %one.1)
  %token = token[] after-all()
  %send = (bf16[8,128]{1,0}, u32[], token[]) send(%x.3, %token), channel_id=9, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %last = (s32[], bf16[8,128]{1,0}, bf16[64,128]{1,0}, s32[]) while(%first.1), condition=%more_layers, body=%layer
}
"""  # noqa: E501


def test_loops_and_collectives_of_a_tpu_program_are_counted_as_often_as_they_run():
    moved = hlo.read(LOOPS)
    found = {c.kind: (c.size, c.times) for c in moved.collectives}
    assert found == {
        "all-gather": (28 * 2 * 256 * 128, 28),  # each is named four times
        "reduce-scatter": (28 * 2 * 16 * 128, 28),
        "collective-permute": (28 * 4 * 2 * 8 * 128, 28 * 4),  # 0, 2, 4, 6
        "all-reduce between slices": (2 * 8 * 128, 1),
    }
    # The gather reads its part and writes the whole; the products only hand them on. The fusion of the sum reads and writes once.
    gather, product, added = 2 * (64 + 256) * 128, 2 * (8 + 8) * 128, 2 * (16 + 4) * 128
    permute, send = 2 * (8 + 8) * 128, 2 * (8 + 8) * 128
    counters = 28 * (4 * (4 + 4 + 4 + 1) + 4 + 4 + 4 + 1)
    assert moved.hbm == pytest.approx(28 * (gather + added + 4 * (permute + product)) + send, abs=3 * counters)


def test_a_loop_of_unknown_length_is_one_of_many_steps():
    """The condition compares with a number that the program is given: as many iterations as the plan says."""
    text = LOOPS.replace(
        "%layers = s32[]{:T(128)} constant(28)", "%layers = s32[]{:T(128)} get-tuple-element(%of.1), index=3"
    )
    found = {c.kind: c.times for c in hlo.read(text, 32).collectives}
    assert found["reduce-scatter"] == 1
    assert found["collective-permute"] == 4
