"""Sums over small programs, written by hand, against sums done by hand."""

import pytest

from mmjax.plan.hlo import Module
from mmjax.plan.totals import add_up

PROGRAM = """\
HloModule jit_step, is_scheduled=true

%add.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%fused (p.1: bf16[8,128]) -> bf16[8,128] {
  %p.1 = bf16[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %scatter = bf16[2,128]{1,0} reduce-scatter(%p.1), channel_id=9, to_apply=%add.1
}

%gather_beside_work (p.3: bf16[8,128]) -> bf16[8,128] {
  %p.3 = bf16[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %gathered = bf16[16,128]{1,0} all-gather(%p.3), channel_id=4, dimensions={0}
}

%inner_condition (c.2: (s32[], bf16[8,128])) -> pred[] {
  %c.2 = (s32[]{:T(128)}, bf16[8,128]{1,0}) parameter(0)
  %three = s32[]{:T(128)} constant(3)
  %i.2 = s32[]{:T(128)} get-tuple-element(%c.2), index=0
  ROOT %less.2 = pred[]{:T(512)} compare(%i.2, %three), direction=LT
}

%inner_body (b.2: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %b.2 = (s32[]{:T(128)}, bf16[8,128]{1,0}) parameter(0)
  %x.2 = bf16[8,128]{1,0} get-tuple-element(%b.2), index=1
  %dot = bf16[8,128]{1,0} fusion(%x.2), kind=kOutput, calls=%fused, \
metadata={op_name="jit(step)/jvp(loss)/image/while/body/closed_call/mlp/dot_general"}, \
backend_config={"estimated_cycles":"100"}
  ROOT %out.2 = (s32[]{:T(128)}, bf16[8,128]{1,0}) tuple(%x.2, %dot)
}

%outer_condition (c.1: (s32[], bf16[8,128])) -> pred[] {
  %c.1 = (s32[]{:T(128)}, bf16[8,128]{1,0}) parameter(0)
  %five = s32[]{:T(128)} constant(5)
  %i.1 = s32[]{:T(128)} get-tuple-element(%c.1), index=0
  ROOT %less.1 = pred[]{:T(512)} compare(%i.1, %five), direction=LT
}

%outer_body (b.1: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %b.1 = (s32[]{:T(128)}, bf16[8,128]{1,0}) parameter(0)
  %piece.1 = bf16[8,128]{1,0} fusion(%b.1), kind=kCustom, calls=%gather_beside_work
  %piece.2 = bf16[8,128]{1,0} fusion(%b.1), kind=kCustom, calls=%gather_beside_work
  %copy.1 = bf16[8,128]{1,0} copy(%b.1), backend_config={"estimated_cycles":"7"}
  %again = (s32[]{:T(128)}, bf16[8,128]{1,0}) while(%b.1), condition=%inner_condition, \
body=%inner_body, metadata={op_name="jit(step)/jvp(loss)/image/while"}
  ROOT %gather.1 = bf16[32,128]{1,0} all-gather(%copy.1), channel_id=1, dimensions={0}
}

%cheap (q.1: f32[4]) -> f32[4] {
  ROOT %cheap.1 = f32[4]{0} negate(%q.1), backend_config={"estimated_cycles":"1"}
}

%dear (q.2: f32[4]) -> f32[4] {
  ROOT %dear.1 = f32[4]{0} negate(%q.2), backend_config={"estimated_cycles":"50"}
}

ENTRY %main (arg: bf16[8,128]) -> bf16[8,128] {
  %arg = bf16[8,128]{1,0:T(8,128)} parameter(0)
  %loop = (s32[]{:T(128)}, /*index=1*/bf16[8,128]{1,0}) while(%arg), \
condition=%outer_condition, body=%outer_body, metadata={op_name="jit(step)/jvp(loss)/image/while"}
  %start = (f32[4]{0}, f32[16]{0}, u32[]{:S(2)}) all-gather-start(%arg), channel_id=2
  %done = f32[16]{0} all-gather-done(%start)
  %reduce = (f32[10]{0}, bf16[6]{0}) all-reduce(%arg, %done), channel_id=3, to_apply=%add.1
  %branch = f32[4]{0} conditional(%arg), branch_computations={%cheap, %dear}
  %kernel = f32[4]{0} custom-call(%arg), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(step)/transpose(jvp(loss))/text/attention/core/pallas_call"}
  %room = f32[4]{0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %last = bf16[8,128]{1,0} multiply(%arg, %arg), \
metadata={op_name="jit(step)/update/mul"}, backend_config={"estimated_cycles":"11"}
}
"""


@pytest.fixture(scope="module")
def totals():
    return add_up(Module.parse(PROGRAM))


def test_loops_within_loops_multiply_out(totals):
    assert totals.cycles[("image", "mlp")] == 5 * 3 * 100
    assert totals.cycles[("update",)] == 11
    assert totals.unread_loops == set()


def test_what_the_compiler_adds_to_a_loop_belongs_to_the_loop(totals):
    assert totals.cycles[("image",)] == 5 * 7


def test_of_branches_the_dearest_counts(totals):
    assert totals.cycles[()] == 50


def test_collective_bytes(totals):
    assert totals.collective_bytes == {
        # Two in the loop, one of them spread over two fusions; and an asynchronous one's result.
        "all-gather": 5 * (32 + 16) * 128 * 2 + 16 * 4,
        "reduce-scatter": 5 * 3 * 2 * 128 * 2,  # inside a fusion
        "all-reduce": 10 * 4 + 6 * 2,
    }
    assert totals.collective_runs == {"all-gather": 11, "reduce-scatter": 15, "all-reduce": 1}


def test_custom_kernels_are_named_and_other_custom_calls_are_not(totals):
    assert totals.kernels == {"text/attention/core/kernel": 1}


def test_a_loop_of_unknown_length_counts_once_and_is_named():
    unknown = PROGRAM.replace("%three = s32[]{:T(128)} constant(3)", "%three = s32[] copy(%c.2)")
    totals = add_up(Module.parse(unknown))
    assert totals.cycles[("image", "mlp")] == 5 * 100
    assert totals.unread_loops == {"again"}


def test_the_compilers_own_trip_count_goes_first():
    known = PROGRAM.replace(
        "body=%inner_body,", 'body=%inner_body, backend_config={"known_trip_count":{"n":"4"}},'
    )
    assert add_up(Module.parse(known)).cycles[("image", "mlp")] == 5 * 4 * 100
