"""Names of TPUs, the reader of compiled programs, and the clockwork that times them.

The programs here are our own, of a handful of lines, in the form that XLA prints; what the
real compiler prints is in plan_test.py.
"""

import dataclasses
import math

import pytest

from neo_jax import config as config_lib
from neo_jax.config import ConfigError
from neo_jax.planning import counting, hlo, predict, search, topologies

V5E = topologies.parse("v5e:4x4")
CHIP = V5E.generation
PLACES = [predict.Place(0, (x, y, 0)) for y in range(4) for x in range(4)]


# ------------------------------------------------------------------------------ topologies


@pytest.mark.parametrize(
    ("name", "key", "chips", "devices"),
    [
        ("v2-8", "v2:2x2", 4, 8),
        ("v3:4x4", "v3:4x4", 16, 32),
        ("v4-8", "v4:2x2x1", 4, 4),
        ("v4-32", "v4:2x2x4", 16, 16),
        ("v5e-1", "v5e:1x1", 1, 1),
        ("v5e-16", "v5e:4x4", 16, 16),
        ("v5litepod-16", "v5e:4x4", 16, 16),
        ("v5e-256", "v5e:16x16", 256, 256),
        ("v5p-8", "v5p:2x2x1", 4, 4),
        ("v6e:2x2x1", "v6e:2x2", 4, 4),
        ("tpu7x-8", "tpu7x:2x2x1", 4, 8),
    ],
)
def test_a_name_is_chips_and_devices(name: str, key: str, chips: int, devices: int) -> None:
    topology = topologies.parse(name)
    assert (topology.key, topology.chips, topology.devices) == (key, chips, devices)


def test_slices_multiply_chips() -> None:
    topology = topologies.parse("v5e-16", num_slices=2)
    assert (topology.key, topology.chips) == ("2xv5e:4x4", 32)


@pytest.mark.parametrize(
    ("name", "slices", "words"),
    [
        ("h100", 1, r"'h100' is unknown.*v4-8 ….*v5e-1 …"),
        ("v9-8", 1, "unknown.*v2-8"),
        ("v5e-17", 1, "no such size.*v5e-1, v5e-4"),
        ("v4-9", 1, "no such size"),
        ("v5e:4x4x4", 1, "2 dimensions"),
        ("v5e:32x32", 1, "at most 256 chips"),
        ("v3-8", 2, "cannot be joined"),
        ("v5e-8", 0, "at least 1"),
    ],
)
def test_a_wrong_name_is_told_in_one_line(name: str, slices: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        topologies.parse(name, slices)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", topologies.GENERATIONS)
def test_the_clock_is_peak_over_the_matrix_units(kind: str) -> None:
    chip = topologies.GENERATIONS[kind]
    units, side = {"v2": (2, 128), "v3": (4, 128), "v4": (8, 128), "v5e": (4, 128)}.get(
        kind, {"v5p": (8, 128), "v6e": (4, 256), "tpu7x": (8, 256)}.get(kind, (0, 0))
    )
    assert chip.peak_flops / (2 * units * side**2) == pytest.approx(chip.clock, rel=0.01)


# --------------------------------------------------------------------------------- reading

PROGRAM = """\
HloModule jit_f, is_scheduled=true

%fused (p0: bf16[256,512], p1: bf16[512,128]) -> bf16[256,128] {
  %p0 = bf16[256,512]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[512,128]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %conv = bf16[256,128]{1,0:T(8,128)(2,1)} convolution(%p0, %p1), dim_labels=bf_io->bf
}

%body (carry: (s32[], bf16[256,512], bf16[512,128])) -> (s32[], bf16[256,512], bf16[512,128]) {
  %carry = (s32[]{:T(128)}, bf16[256,512]{1,0:T(8,128)(2,1)}, bf16[512,128]{1,0}) parameter(0)
  %x = bf16[256,512]{1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=1
  %w = bf16[512,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%carry), index=2
  %product = bf16[256,128]{1,0:T(8,128)(2,1)} fusion(%x, %w), kind=kOutput, calls=%fused, \
backend_config={"window_config":{"estimated_cycles":"3000"},"flag_configs":[]}
  ROOT %out = (s32[], bf16[256,512]{1,0}, bf16[512,128]{1,0}) tuple(%x, %x, %w)
}

%condition (carry.1: (s32[], bf16[256,512], bf16[512,128])) -> pred[] {
  %carry.1 = (s32[], bf16[256,512]{1,0}, bf16[512,128]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (a: bf16[256,512], b: bf16[512,128]) -> bf16[256,512] {
  %a = bf16[256,512]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[512,128]{1,0:T(8,128)(2,1)} parameter(1)
  %zero = s32[] constant(0)
  %init = (s32[], bf16[256,512]{1,0}, /*index=2*/bf16[512,128]{1,0}) tuple(%zero, %a, %b)
  %loop = (s32[], bf16[256,512]{1,0}, bf16[512,128]{1,0}) while(%init), condition=%condition, \
body=%body, backend_config={"known_trip_count":{"n":"7"}}
  ROOT %result = bf16[256,512]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
"""


def test_computations_shapes_and_notes_are_read() -> None:
    program = hlo.parse(PROGRAM)
    assert set(program.computations) == {"fused", "body", "condition", "main"}
    assert program.entry.name == "main"
    assert program.entry.by_name["init"].operands == ("zero", "a", "b")
    assert program.trip_count(program.entry.by_name["loop"]) == 7
    assert program.entry.root.name == "result"
    body = program.computations["body"]
    assert body.by_name["product"].cycles == 3000
    assert body.by_name["carry"].arrays[1] == hlo.Array("bf16", (256, 512), True)
    assert not body.by_name["w"].arrays[0].in_hbm


def test_text_without_an_entry_is_refused() -> None:
    with pytest.raises(ValueError, match="no entry"):
        hlo.parse("HloModule empty\n")


def test_a_loop_takes_its_body_times_its_trips() -> None:
    prediction = predict.predict(hlo.parse(PROGRAM), V5E, PLACES)
    assert prediction.seconds == pytest.approx(7 * 3000 / CHIP.clock)
    assert prediction.flops == 7 * 2 * 256 * 512 * 128
    # Operands that lie on the chip are not fetched from HBM.
    assert prediction.hbm_bytes == 7 * 2 * (256 * 512 + 256 * 128)


def test_a_scan_runs_until_its_counter_reaches_the_constant() -> None:
    """As JAX's scans are compiled: no note, but a condition that compares with a constant."""
    text = PROGRAM.replace('backend_config={"known_trip_count":{"n":"7"}}', "metadata={}")
    condition = """\
  %bound = s32[]{:T(128)} constant(6)
  %count = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  ROOT %less = pred[] compare(%count, %bound), direction=LT
"""
    text = text.replace("  ROOT %less = pred[] constant(true)\n", condition)
    prediction = predict.predict(hlo.parse(text), V5E, PLACES)
    assert prediction.seconds == pytest.approx(6 * 3000 / CHIP.clock)


def test_a_loop_of_unknown_length_is_refused() -> None:
    text = PROGRAM.replace('backend_config={"known_trip_count":{"n":"7"}}', "metadata={}")
    with pytest.raises(ValueError, match="trip count"):
        predict.predict(hlo.parse(text), V5E, PLACES)


def test_one_pass_of_a_loop_of_unknown_length_is_its_body() -> None:
    text = PROGRAM.replace('backend_config={"known_trip_count":{"n":"7"}}', "metadata={}")
    one = predict.one_more_trip(hlo.parse(text), V5E, PLACES)
    assert one.seconds == pytest.approx(3000 / CHIP.clock)
    with pytest.raises(ValueError, match="0 loops"):
        predict.one_more_trip(hlo.parse(PROGRAM), V5E, PLACES)


@pytest.mark.parametrize("cycles", ["1", "0"])
def test_nothing_is_faster_than_its_roofline(cycles: str) -> None:
    text = PROGRAM.replace('"estimated_cycles":"3000"', f'"estimated_cycles":"{cycles}"')
    prediction = predict.predict(hlo.parse(text), V5E, PLACES)
    least = max(
        prediction.flops / CHIP.peak_flops, prediction.hbm_bytes / CHIP.hbm_bytes_per_second
    )
    assert prediction.seconds == pytest.approx(least)


# ---------------------------------------------------------------------------------- counts


def test_padding_of_a_window_is_not_multiplied() -> None:
    """A batch of 20 products as a convolution: 20 × (m·k·n), not 20² of them."""
    text = """\
ENTRY %main (a: bf16[20,64,32], b: bf16[20,32,16]) -> bf16[64,16,20] {
  %a = bf16[20,64,32]{2,1,0} parameter(0)
  %b = bf16[20,32,16]{2,1,0} parameter(1)
  ROOT %c = bf16[64,16,20]{1,0,2} convolution(%a, %b), \
window={size=20 stride=19 pad=19_19 lhs_dilate=20 rhs_reversal=1}, dim_labels=0bf_0io->bf0
}
"""
    program = hlo.parse(text)
    counted = counting.flops(program, program.entry, program.entry.root)
    assert counted <= 2 * 20 * 64 * 32 * 16


def test_a_slice_of_a_stack_is_all_that_is_read() -> None:
    text = """\
%pick (p0: f32[24,1024,1024], p1: s32[]) -> f32[1,1024,1024] {
  %p0 = f32[24,1024,1024]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %one = f32[1,1024,1024]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), \
dynamic_slice_sizes={1,1024,1024}
}

%put (p0.1: f32[24,1024], p1.1: f32[1,1024], p2.1: s32[]) -> f32[24,1024] {
  %p0.1 = f32[24,1024]{1,0} parameter(0)
  %p1.1 = f32[1,1024]{1,0} parameter(1)
  %p2.1 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %update = f32[24,1024]{1,0} dynamic-update-slice(%p0.1, %p1.1, %p2.1, %zero.1)
}

ENTRY %main (a: f32[24,1024,1024], i: s32[], s: f32[24,1024], u: f32[1,1024]) -> f32[24,1024] {
  %a = f32[24,1024,1024]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %s = f32[24,1024]{1,0} parameter(2)
  %u = f32[1,1024]{1,0} parameter(3)
  %read = f32[1,1024,1024]{2,1,0} fusion(%a, %i), kind=kLoop, calls=%pick
  ROOT %written = f32[24,1024]{1,0} fusion(%s, %u, %i), kind=kLoop, calls=%put
}
"""
    program = hlo.parse(text)
    read, written = (program.entry.by_name[name] for name in ("read", "written"))
    slice_bytes = 4 * 1024 * 1024
    assert counting.hbm_bytes(program, program.entry, read) == pytest.approx(
        2 * slice_bytes, rel=1e-5
    )
    assert counting.hbm_bytes(program, program.entry, written) == pytest.approx(
        2 * 4 * 1024, rel=1e-2
    )


def test_a_slice_that_a_fusion_inside_a_fusion_takes_is_all_that_is_read() -> None:
    text = """\
%pick (p0: f32[24,1024,1024], p1: s32[]) -> f32[1,1024,1024] {
  %p0 = f32[24,1024,1024]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %one = f32[1,1024,1024]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), \
dynamic_slice_sizes={1,1024,1024}
}

%around (q0: f32[24,1024,1024], q1: s32[]) -> f32[1,1024,1024] {
  %q0 = f32[24,1024,1024]{2,1,0} parameter(0)
  %q1 = s32[] parameter(1)
  %picked = f32[1,1024,1024]{2,1,0} fusion(%q0, %q1), kind=kLoop, calls=%pick
  ROOT %made = f32[1,1024,1024]{2,1,0} negate(%picked)
}

ENTRY %main (a: f32[24,1024,1024], i: s32[]) -> f32[1,1024,1024] {
  %a = f32[24,1024,1024]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %read = f32[1,1024,1024]{2,1,0} fusion(%a, %i), kind=kLoop, calls=%around
}
"""
    program = hlo.parse(text)
    moved = counting.hbm_bytes(program, program.entry, program.entry.root)
    assert moved == pytest.approx(2 * 4 * 1024 * 1024, rel=1e-5)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, dimensions={0}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=2] {'a','c'}, x", [[0, 1, 2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}, x", [[0, 1], [1, 0]]),
        ("replica_groups={}, x", []),
    ],
)
def test_groups_of_a_collective(text: str, groups: list[list[int]]) -> None:
    line = hlo.Instruction("c", "all-gather", (), (), text, False)
    assert counting.groups(line) == groups


# --------------------------------------------------------------------------------- overlap


def gather(between: str = "", done_after: str = "") -> hlo.Program:
    """A gather of 16 MiB over a row of four chips, with work placed inside and after it."""
    return hlo.parse(
        f"""\
ENTRY %main (a: bf16[4,1048576], b: bf16[8]) -> bf16[16,1048576] {{
  %a = bf16[4,1048576]{{1,0}} parameter(0)
  %b = bf16[8]{{0}} parameter(1)
  %start = (bf16[4,1048576]{{1,0}}, bf16[16,1048576]{{1,0}}) all-gather-start(%a), \
replica_groups=[4,4]<=[16], dimensions={{0}}
{between}  %done = bf16[16,1048576]{{1,0}} all-gather-done(%start)
{done_after}  ROOT %r = bf16[16,1048576]{{1,0}} bitcast(%done)
}}
"""
    )


def work(cycles: int) -> str:
    return (
        "  %w = bf16[8]{0} fusion(%b), kind=kLoop, calls=%none, "
        f'backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}\n'
    )


WHOLE = 16 * 1048576 * 2 * 3 / 4 / CHIP.link_bytes_per_second + 3 * predict.HOP_SECONDS


def test_a_collective_takes_its_bytes_over_the_links_of_its_group() -> None:
    """Four chips in a row without a ring: the end receives three quarters over one link."""
    prediction = predict.predict(gather(), V5E, PLACES)
    assert prediction.seconds == pytest.approx(WHOLE)
    assert prediction.exposed == {"ici": pytest.approx(WHOLE)}
    assert prediction.ici_bytes == 16 * 1048576 * 2 * 3 / 4


@pytest.mark.parametrize("milliseconds", [0.1, 0.3, 5.0])
def test_only_work_between_start_and_done_hides_a_collective(milliseconds: float) -> None:
    seconds = milliseconds / 1e3
    cycles = round(seconds * CHIP.clock)
    inside = predict.predict(gather(between=work(cycles)), V5E, PLACES)
    after = predict.predict(gather(done_after=work(cycles)), V5E, PLACES)
    assert inside.seconds == pytest.approx(max(WHOLE, seconds), rel=1e-4)
    assert after.seconds == pytest.approx(WHOLE + seconds, rel=1e-4)
    assert inside.seconds_without_overlap == pytest.approx(WHOLE + seconds, rel=1e-4)


@pytest.mark.parametrize(
    ("moves", "hops", "messages"),
    [
        ([(0, 1), (1, 2), (2, 3), (3, 0)], 3, 1),  # the long way back has the other lanes
        ([(0, 2), (1, 3), (2, 0), (3, 1)], 2, 2),  # two messages between the middle chips
        ([(i, (i + 4) % 16) for i in range(16)], 3, 1),  # four columns beside one another
        ([(0, 5), (5, 0)], 2, 1),  # along one dimension, then the other
    ],
)
def test_messages_that_share_a_link_wait_for_each_other(
    moves: list[tuple[int, int]], hops: int, messages: int
) -> None:
    seconds = predict.predict(permute(moves), V5E, PLACES).seconds
    sending = messages * 4 * 1048576 / CHIP.link_bytes_per_second
    assert seconds == pytest.approx(sending + hops * predict.HOP_SECONDS)


def test_a_message_goes_round_a_ring_the_shorter_way() -> None:
    ring = topologies.parse("v5e:16x16")
    places = [predict.Place(0, (x, y, 0)) for y in range(16) for x in range(16)]
    sending = 4 * 1048576 / CHIP.link_bytes_per_second
    for moves, hops in ([(0, 15), (15, 0)], 1), ([(1, 14)], 3), ([(0, 8)], 8), ([(0, 255)], 2):
        seconds = predict.predict(permute(moves), ring, places).seconds
        assert seconds == pytest.approx(sending + hops * predict.HOP_SECONDS)


def permute(moves: list[tuple[int, int]]) -> hlo.Program:
    """4 MiB from each chip to another."""
    pairs = ",".join(f"{{{a},{b}}}" for a, b in moves)
    return hlo.parse(
        f"""\
ENTRY %main (a: f32[1048576]) -> f32[1048576] {{
  %a = f32[1048576]{{0}} parameter(0)
  ROOT %r = f32[1048576]{{0}} collective-permute(%a), source_target_pairs={{{pairs}}}
}}
"""
    )


def test_a_group_over_two_slices_crosses_the_network() -> None:
    two = topologies.parse("v5e:2x2", num_slices=2)
    places = [predict.Place(s, (x, y, 0)) for s in (0, 1) for y in (0, 1) for x in (0, 1)]
    text = """\
ENTRY %main (a: f32[1048576]) -> f32[1048576] {
  %a = f32[1048576]{0} parameter(0)
  ROOT %r = f32[1048576]{0} all-reduce(%a), replica_groups=[1,8]<=[8], to_apply=%add
}
"""
    prediction = predict.predict(hlo.parse(text), two, places)
    assert prediction.dcn_bytes == 4 * 1048576 / 4  # a quarter each, there and back, by halves
    assert prediction.ici_bytes == 2 * 4 * 1048576 * 3 / 4
    assert prediction.seconds > prediction.dcn_bytes / 3.125e9


FUSED_CHAIN = """\
%begin (p: bf16[4,1048576]) -> (bf16[4,1048576], bf16[16,1048576], u32[]) {
  %p = bf16[4,1048576]{1,0} parameter(0)
  %g = bf16[16,1048576]{1,0} all-gather(%p), replica_groups=[4,4]<=[16], dimensions={0}, \
frontend_attributes={chain_id="3"}
  ROOT %c = (bf16[4,1048576]{1,0}, bf16[16,1048576]{1,0}, u32[]) custom-call(%g), \
custom_call_target="AsyncCollectiveStart"
}

%carry (q: bf16[8], s: u32[]) -> (bf16[8], u32[]) {
  %q = bf16[8]{0} parameter(0)
  %s = u32[] parameter(1)
  %h = bf16[16,1048576]{1,0} all-gather(%q), replica_groups=[4,4]<=[16], dimensions={0}, \
frontend_attributes={chain_id="3"}
  ROOT %t = (bf16[8]{0}, u32[]) tuple(%q, %s)
}

%end (u: bf16[16,1048576]) -> bf16[16,1048576] {
  %u = bf16[16,1048576]{1,0} parameter(0)
  %k = bf16[16,1048576]{1,0} all-gather(%u), replica_groups=[4,4]<=[16], dimensions={0}, \
frontend_attributes={chain_id="3"}
  ROOT %d = bf16[16,1048576]{1,0} custom-call(%u, %k), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: bf16[4,1048576], b: bf16[8]) -> bf16[16,1048576] {
  %a = bf16[4,1048576]{1,0} parameter(0)
  %b = bf16[8]{0} parameter(1)
  %start = (bf16[4,1048576]{1,0}, bf16[16,1048576]{1,0}, u32[]) fusion(%a), kind=kCustom, \
calls=%begin
  %state = u32[] get-tuple-element(%start), index=2
  %product = (bf16[8]{0}, u32[]) fusion(%b, %state), kind=kOutput, calls=%carry, \
backend_config={"window_config":{"estimated_cycles":"CYCLES"}}
  %all = bf16[16,1048576]{1,0} get-tuple-element(%start), index=1
  ROOT %done = bf16[16,1048576]{1,0} fusion(%all), kind=kCustom, calls=%end
}
"""


@pytest.mark.parametrize("milliseconds", [0.2, 3.0])
def test_a_collective_carried_on_by_products_is_counted_once(milliseconds: float) -> None:
    seconds = milliseconds / 1e3
    text = FUSED_CHAIN.replace("CYCLES", str(round(seconds * CHIP.clock)))
    prediction = predict.predict(hlo.parse(text), V5E, PLACES)
    assert prediction.ici_bytes == 16 * 1048576 * 2 * 3 / 4
    assert prediction.seconds == pytest.approx(max(WHOLE, seconds), rel=1e-4)


# --------------------------------------------------------------------------------- kernels


def kernel(phase: str, table: str, sizes: str, outputs: str) -> hlo.Program:
    """A splash kernel of 4 sequences × 12 heads × 2048 × 128; its notes span lines."""
    return hlo.parse(
        f"""\
ENTRY %main (t: {table}, q: bf16[4,12,2048,128]) -> bf16[4,12,2048,128] {{
  %t = {table}{{2,1,0}} parameter(0)
  %q = bf16[4,12,2048,128]{{3,2,1,0}} parameter(1)
  %call = {outputs} custom-call(%t, %t, %q, %q, %q), \
custom_call_target="tpu_custom_call", frontend_attributes={{kernel_metadata={{
"xprof_metadata":"{{{sizes}}}"
}}}}, metadata={{op_name="jit(f)/splash_mha_{phase}_no_residuals/pallas_call"}}
  ROOT %r = bf16[4,12,2048,128]{{3,2,1,0}} get-tuple-element(%call), index=0
}}
"""
    )


ONE = "(bf16[4,12,2048,128]{3,2,1,0})"
FUSED = "(bf16[4,2,12,2048,128]{4,3,2,1,0}, bf16[4,12,2048,128]{3,2,1,0})"


@pytest.mark.parametrize(
    ("phase", "table", "block_q", "block_kv", "suffix", "outputs", "blocks", "products"),
    [
        # Causal, blocks of 1024: three of four are not empty.
        ("fwd", "s8[1,2,2]", 1024, 1024, "", ONE, 3, 2),
        ("dkv", "s8[1,2,2]", 1024, 1024, "_dkv", ONE, 3, 4),
        ("dkv", "s8[1,2,2]", 1024, 1024, "_dkv", FUSED, 3, 5),
        # A window of 256: no row of 512 queries meets more than three blocks of 256 keys.
        ("fwd", "s8[1,4,3]", 512, 256, "", ONE, 12, 2),
        ("dq", "s8[1,4,3]", 512, 256, "_dq", ONE, 12, 3),
    ],
)
def test_a_kernel_computes_the_blocks_that_its_mask_leaves(
    phase: str,
    table: str,
    block_q: int,
    block_kv: int,
    suffix: str,
    outputs: str,
    blocks: int,
    products: int,
) -> None:
    sizes = rf"\"block_q{suffix}\": {block_q}, \"block_kv{suffix}\": {block_kv}"
    program = kernel(phase, table, sizes, outputs)
    prediction = predict.predict(program, V5E, PLACES)
    work = 2.0 * products * blocks * block_q * block_kv * 128 * 4 * 12
    assert prediction.flops == work
    least = work / (CHIP.peak_flops * predict.KERNEL_EFFICIENCY)
    assert prediction.parts["kernels"] == pytest.approx(least)


# ---------------------------------------------------------------------------------- search


def test_candidates_divide_and_the_best_fits() -> None:
    config = config_lib.Config(
        model=config_lib.preset_model("neo_1p3b"), data=config_lib.DataConfig(batch_size=64)
    )
    found = search.candidates(config, V5E)
    assert found[0].fits
    for candidate in found:
        mesh = candidate.config.mesh
        assert mesh.data * mesh.fsdp * mesh.tensor == 16
        rows = 64 // (mesh.data * mesh.fsdp)
        assert rows % candidate.config.train.accumulation_steps == 0
    fastest = [c.seconds for c in found if c.fits]
    assert fastest == sorted(fastest)


def test_slices_are_joined_by_data_parallelism() -> None:
    config = config_lib.Config(
        model=config_lib.preset_model("neo_1p3b"), data=config_lib.DataConfig(batch_size=64)
    )
    for candidate in search.candidates(config, topologies.parse("v5e-16", num_slices=2)):
        mesh = candidate.config.mesh
        assert mesh.slices == 2
        assert mesh.data * mesh.fsdp * mesh.tensor == 16  # of one slice


def test_a_batch_smaller_than_the_mesh_is_told() -> None:
    config = config_lib.Config(
        model=dataclasses.replace(config_lib.preset_model("neo_1p3b"), num_heads=1),
        data=config_lib.DataConfig(batch_size=1),
    )
    with pytest.raises(ConfigError, match=r"data\.batch_size=1"):
        search.candidates(config, V5E)


def test_more_memory_is_asked_for_with_larger_slices_of_the_batch() -> None:
    config = config_lib.Config(
        model=config_lib.preset_model("neo_125m"), data=config_lib.DataConfig(batch_size=64)
    )
    one = topologies.parse("v5e-1")
    by_steps = {
        c.config.train.accumulation_steps: c.hbm_gib
        for c in search.candidates(config, one)
        if c.config.model.remat == "full"
    }
    sizes = [by_steps[n] for n in sorted(by_steps) if n > 1]
    assert all(math.isfinite(size) for size in sizes)
    assert sizes == sorted(sizes, reverse=True)
