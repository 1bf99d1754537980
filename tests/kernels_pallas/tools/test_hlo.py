"""The reader of HLO text, on programs that XLA compiled and on pieces of text."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from kernels_pallas.tools import hlo


def test_a_compiled_program_with_loops():
    def layer(x, w):
        return jnp.tanh(x @ w), None

    def function(w, x):
        x, _ = lax.scan(layer, x, w)
        return lax.fori_loop(0, 3, lambda i, x: x @ x, x)

    shapes = (
        jax.ShapeDtypeStruct((5, 64, 64), jnp.float32),
        jax.ShapeDtypeStruct((64, 64), jnp.float32),
    )
    module = hlo.HloModule(jax.jit(function).lower(*shapes).compile().as_text())
    counted = sum(visit.times * hlo.flops(module, visit) for visit in module.visits())
    assert counted == (5 + 3) * 2 * 64**3 and module.unknown_loops == []


@pytest.mark.parametrize(
    "result, dtype, shape, size, space",
    [
        ("f32[4,1024]{1,0:T(4,128)S(1)}", "f32", (4, 1024), 4 * 4096, 1),
        ("bf16[<=8]{0}", "bf16", (8,), 16, 0),
        ("pred[]", "pred", (), 1, 0),
        ("f8e4m3fn[16]{0:S(5)}", "f8e4m3fn", (16,), 16, 5),
        ("s4[16]{0}", "s4", (16,), 8, 0),
    ],
)
def test_arrays(result, dtype, shape, size, space):
    (array,) = hlo.Instruction("x", result, "copy", (), "").arrays
    assert array == hlo.Array(dtype, shape, space)
    assert array.bytes == size and array.in_hbm == (space == 0)


TEXT = """HloModule step

%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s = (s32[], f32[8]{0}) parameter(0)
  %n = s32[] get-tuple-element(%s), index=0
  %x = f32[8]{0} get-tuple-element(%s), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%n, %two)
  %kernel.1 = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"estimated_cycles":"12"}
  ROOT %t = (s32[], f32[8]{0}) tuple(%next, %kernel.1)
}

%condition (s.1: (s32[], f32[8])) -> pred[] {
  %s.1 = (s32[], f32[8]{0}) parameter(0)
  %n.1 = s32[] get-tuple-element(%s.1), index=0
  %limit = s32[] constant(7)
  ROOT %less = pred[] compare(%n.1, %limit), direction=LT
}

ENTRY %main (x: f32[8]) -> (s32[], f32[8]) {
  %x.1 = f32[8]{0} parameter(0)
  %start = s32[] constant(1)
  %q = (s32[], f32[8]{0}) tuple(%start, %x.1)
  ROOT %loop = (s32[], f32[8]{0}) while(%q), condition=%condition, body=%body
}
"""


def test_a_loops_counter_is_followed():
    """From 1 by 2 to 7: three rounds."""
    module = hlo.HloModule(TEXT)
    (kernel,) = [visit for visit in module.visits() if visit.instruction.is_kernel]
    assert (kernel.times, kernel.computation, kernel.fused) == (3, "body", False)
    assert kernel.instruction.estimated_cycles == 12
    assert [x.name for x in module.operands(kernel.instruction, "body")] == ["x"]
    assert module.root("main").name == "loop" and module.unknown_loops == []
    known = TEXT.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"9"}}')
    assert {v.times for v in hlo.HloModule(known).visits()} == {1, 9}


def test_a_loop_whose_counter_is_unknown_counts_once_and_is_named():
    module = hlo.HloModule(TEXT.replace("s32[] constant(1)", "s32[] partition-id()"))
    assert {visit.times for visit in module.visits()} == {1} and module.unknown_loops == ["loop"]


CONVOLUTIONS = {
    "strided, padded": dict(window_strides=(2, 1), padding=((1, 2), (0, 3))),
    "dilated": dict(window_strides=(1, 1), padding=((2, 2), (0, 0)), lhs_dilation=(2, 1), rhs_dilation=(1, 2)),
}  # fmt: skip


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions_count_as_xla_counts_them(case):
    x, w = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 3, 9, 8), (4, 3, 3, 3)))
    lowered = jax.jit(lambda x, w: lax.conv_general_dilated(x, w, **CONVOLUTIONS[case])).lower(x, w)
    module = hlo.HloModule(lowered.compiler_ir("hlo").as_hlo_text())
    assert sum(hlo.flops(module, v) for v in module.visits()) == lowered.cost_analysis()["flops"]


@pytest.mark.parametrize(
    "groups, expected",
    [
        ("replica_groups={{0,1},{2,3}}", [(0, 1), (2, 3)]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [(0, 2), (1, 3)]),
        ("replica_groups={}", [(0, 1, 2, 3)]),
        (
            "replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=2], device_ids=([2,2]T(1,0)) {'axis_0'}",
            [(0, 1), (2, 3)],
        ),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [(0, 1), (2, 3)]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", [(0, 2), (1, 3)]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", [(0, 1), (2, 3)]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [(0, 1, 2, 3)]),
        ("source_target_pairs={{0,1},{1,2},{3,3}}", [(0, 1), (1, 2)]),
    ],
)
def test_groups(groups, expected):
    instruction = hlo.Instruction("x", "f32[4]", "all-reduce", ("y",), f", {groups}, channel_id=1")
    assert sorted(hlo.groups(instruction, 4)) == expected
