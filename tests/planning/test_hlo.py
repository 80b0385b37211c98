"""Costs counted in the text of a program, against XLA's counts and arithmetic."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jlora.planning import hlo_cost
from jlora.training import sharding


def program(fn: Any, *shapes: tuple[int, ...], **options: Any) -> tuple[hlo_cost.HloModule, Any]:
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = jax.jit(fn, **options).lower(*arrays).compile()
    return hlo_cost.parse_hlo(compiled.as_text()), compiled


def flops(of: hlo_cost.HloModule, unrolled: bool = True) -> int:
    return sum(
        run.executions * hlo_cost.count_flops(run)
        for run in hlo_cost.iter_executed_instructions(of, count_trips=unrolled)
    )


def convolved(**how: Any) -> Any:
    return lambda x, w: lax.conv_general_dilated(
        x, w, dimension_numbers=("NHWC", "HWIO", "NHWC"), **how
    )


@pytest.mark.parametrize(
    ("fn", "shapes"),
    [
        (lambda x, w: x @ w, ((4, 6), (6, 5))),
        (lambda x, w: jnp.einsum("bij,bjk->bik", x, w), ((3, 4, 6), (3, 6, 5))),
        (convolved(window_strides=(1, 1), padding="SAME"), ((2, 9, 7, 6), (3, 3, 6, 5))),
        (convolved(window_strides=(2, 3), padding="VALID"), ((2, 9, 7, 6), (3, 2, 6, 5))),
        (
            convolved(window_strides=(1, 1), padding=((1, 2), (1, 1)), lhs_dilation=(2, 1)),
            ((2, 9, 7, 6), (3, 3, 6, 5)),
        ),
        (
            convolved(window_strides=(1, 1), padding="SAME", rhs_dilation=(1, 2)),
            ((2, 9, 7, 6), (3, 3, 6, 5)),
        ),
        (
            convolved(window_strides=(1, 1), padding="SAME", feature_group_count=3),
            ((2, 9, 7, 6), (3, 3, 2, 15)),
        ),
    ],
)
def test_count_flops_equals_xla(fn: Any, shapes: Any) -> None:
    found, compiled = program(fn, *shapes)
    assert flops(found) == compiled.cost_analysis()["flops"]


def test_count_flops_multiplies_by_trips() -> None:
    def layers(x: jax.Array, stack: jax.Array) -> jax.Array:
        def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            return lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w), x), None

        return lax.scan(layer, x, stack)[0]

    found, _ = program(layers, (4, 6), (7, 6, 6))
    once = 2 * 4 * 6 * 6
    assert flops(found) == 7 * 3 * once
    assert flops(found, unrolled=False) == once


def test_trip_count_unknown_is_none() -> None:
    found, _ = program(
        lambda x: lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x + 1, x), (4, 4)
    )
    (loop,) = (
        r.instruction
        for r in hlo_cost.iter_executed_instructions(found)
        if r.instruction.opcode == "while"
    )
    assert hlo_cost.trip_count(found, loop) is None
    assert flops(found) == 2 * 4**3


# A TPU program: without trip counts, and with products as convolutions.
TPU = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%condition (p: (s32[], bf16[4,8])) -> pred[] {
  %p = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%product (x: bf16[4,8], w: bf16[5,8,8], i: s32[]) -> bf16[4,8] {
  %x = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %w = bf16[5,8,8]{2,1,0:T(8,128)(2,1)} parameter(1)
  %at = s32[] parameter(2)
  %z = s32[] constant(0)
  %one = bf16[1,8,8]{2,1,0} dynamic-slice(%w, %at, %z, %z), dynamic_slice_sizes={1,8,8}
  %flat = bf16[8,8]{1,0} bitcast(%one)
  ROOT %y = bf16[4,8]{1,0:S(1)} convolution(%x, %flat), dim_labels=bf_io->bf
}

%body (p.1: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p.1 = (s32[]{:T(128)}, bf16[4,8]{1,0:S(1)}, bf16[5,8,8]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %x.1 = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p.1), index=1
  %w.1 = bf16[5,8,8]{2,1,0:T(8,128)(2,1)} get-tuple-element(%p.1), index=2
  %y.1 = bf16[4,8]{1,0:S(1)} fusion(%x.1, %w.1, %i.1), kind=kOutput, calls=%product
  %r = bf16[4,8] all-reduce(%y.1), channel_id=3, replica_groups=mesh['a'=2,'b'=4] {'b'} {colors:6
  %by = s32[] constant(1)
  %next = s32[] add(%i.1, %by)
  ROOT %t = (s32[], bf16[4,8], bf16[5,8,8]) tuple(%next, %r, %w.1)
}

ENTRY %main (x.2: bf16[4,8], w.2: bf16[5,8,8]) -> bf16[4,8] {
  %x.2 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %w.2 = bf16[5,8,8]{2,1,0:T(8,128)(2,1)} parameter(1)
  %zero = s32[] constant(0)
  %near = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} copy(%x.2)
  %tuple = (s32[], bf16[4,8], /*index=2*/bf16[5,8,8]) tuple(%zero, %near, %w.2)
  %loop = (s32[], bf16[4,8], bf16[5,8,8]) while(%tuple), condition=%condition, body=%body
  %out = bf16[4,8]{1,0:S(1)} get-tuple-element(%loop), index=1
  %s = (bf16[4,8], bf16[16,8]) all-gather-start(%out), channel_id=4, replica_groups=[2,4]<=[8]
  %d = bf16[16,8] all-gather-done(%s)
  %again = (bf16[4,8], bf16[16,8]) all-gather-start(%out), channel_id=4, replica_groups=[2,4]<=[8]
  ROOT %p.3 = bf16[4,8] collective-permute(%out), channel_id=5, source_target_pairs={{0,1},{1,0}}
}
"""


def test_tpu_program_costs() -> None:
    found = hlo_cost.parse_hlo(TPU)
    assert flops(found) == 5 * 2 * 4 * 8 * 8
    one = 4 * 8 * 2
    assert hlo_cost.collect_collective_stats(found) == (
        hlo_cost.CollectiveStats("all-gather", 1, 3 * one),  # One, written in two places.
        hlo_cost.CollectiveStats("all-reduce", 5, 5 * 2 * 3 * one // 4, 6),
        hlo_cost.CollectiveStats("collective-permute", 1, one),
    )
    traffic = {
        run.instruction.name: run.executions * hlo_cost.count_hbm_bytes(found, run)
        for run in hlo_cost.iter_executed_instructions(found)
    }
    assert traffic["near"] == one  # Read from HBM, and written near the core.
    # A layer's slice of the stack each time; memory of the core does not count.
    assert traffic["y.1"] == 5 * (8 * 8 * 2 + 4)
    assert traffic["one"] == 0  # Inside a fusion.


@pytest.mark.parametrize(
    ("written", "changed", "trips"),
    [
        ("%by = s32[] constant(1)", "%by = s32[] constant(2)", 3),  # Unrolled twice.
        ("add(%i.1, %by)", "add(%i.1, %i.1)", None),
        ("direction=LT", "direction=NE", None),
        ("tuple(%next, %r", "tuple(%i.1, %r", None),
    ],
)
def test_trip_count_is_bound_over_increment(written: str, changed: str, trips: Any) -> None:
    assert written in TPU
    found = hlo_cost.parse_hlo(TPU.replace(written, changed))
    (loop,) = (
        r.instruction
        for r in hlo_cost.iter_executed_instructions(found)
        if r.instruction.opcode == "while"
    )
    assert hlo_cost.trip_count(found, loop) == trips


@pytest.mark.parametrize(
    ("groups", "ring"),
    [
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,2,2]T(1,0,2)", 2),
        ("{{0,2,4,6},{1,3,5,7}}", 4),
        ("mesh['a'=2,'b'=4] {'a','b'}", 8),
        ("mesh['a'=2,'b'=1,'c'=4], device_ids=([2,4]T(1,0)) {'a'}", 2),
        ("mesh['a'=8] {'a':(2)4}", 4),
    ],
)
def test_replica_group_size_of_every_format(groups: str, ring: int) -> None:
    text = TPU.replace("[2,4]<=[8]", groups)
    (gathered, *_) = hlo_cost.collect_collective_stats(hlo_cost.parse_hlo(text))
    assert gathered.sent_bytes == (ring - 1) * 64


def test_replica_group_size_unknown_raises() -> None:
    with pytest.raises(ValueError, match="Unknown format .*: 'replica_groups=all-of-them"):
        hlo_cost.collect_collective_stats(
            hlo_cost.parse_hlo(TPU.replace("[2,4]<=[8]", "all-of-them"))
        )


def test_parse_hlo_other_text_raises() -> None:
    with pytest.raises(ValueError, match="must be an HLO module, but has no ENTRY"):
        hlo_cost.parse_hlo("module @jit_f {\n}\n")


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        # The weight (16, 24) is gathered from 8 shards; the result is reduced over 8.
        ({"fsdp": 8}, {"all-gather": 16 * 24 * 4 * 7 // 8, "all-reduce": 4 * 2 * 7 // 8}),
        ({"data": 8}, {"all-reduce": 4 * 2 * 7 // 8}),
    ],
    ids=str,
)
def test_collective_stats_count_ring_bytes(sizes: Any, expected: Any) -> None:
    mesh = sharding.make_mesh(sizes)
    place = lambda *names: NamedSharding(mesh, PartitionSpec(*names))

    def fn(x: jax.Array, w: jax.Array) -> jax.Array:
        y = lax.with_sharding_constraint(x @ w, place(sharding.BATCH_AXES))
        return jnp.sin(y).sum()

    found, _ = program(
        fn, (32, 16), (16, 24), in_shardings=(place(sharding.BATCH_AXES), place("fsdp"))
    )
    assert {c.kind: c.sent_bytes for c in hlo_cost.collect_collective_stats(found)} == expected
