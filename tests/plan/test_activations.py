"""A forward loop, a backward loop, and what goes from one to the other."""

from mmjax.plan.activations import activation_bytes
from mmjax.plan.hlo import Module

FORWARD = 'metadata={op_name="jit(step)/jvp(loss)/image/while"}'
BACKWARD = 'metadata={op_name="jit(step)/transpose(jvp(loss))/image/while"}'
PROGRAM = f"""\
HloModule jit_step

ENTRY %main (w: f32[8,16]) -> f32[8,16] {{
  %w = f32[8,16]{{1,0}} parameter(0)
  %x = bf16[4,16]{{1,0}} fusion(%w), calls=%f, metadata={{op_name="jit(step)/jvp(loss)/add"}}
  %there = (s32[], bf16[12,4,16]{{2,1,0}}, f32[3]{{0:S(1)}}) while(%x), body=%b, {FORWARD}
  %carries = bf16[12,4,16]{{2,1,0}} get-tuple-element(%there), index=1
  %sums = f32[3]{{0:S(1)}} get-tuple-element(%there), index=2
  %same = bf16[12,4,16]{{2,1,0}} copy(%carries)
  %both = (bf16[12,4,16]{{2,1,0}}, f32[3]{{0:S(1)}}, f32[8,16]{{1,0}}) tuple(%same, %sums, %w)
  %back = (s32[], f32[8,16]{{1,0}}) while(%both), body=%b, {BACKWARD}
  %gradient = f32[8,16]{{1,0}} get-tuple-element(%back), index=1
  %last = f32[4]{{0}} fusion(%x), calls=%f, {BACKWARD}
  ROOT %new = f32[8,16]{{1,0}} add(%w, %gradient), metadata={{op_name="jit(step)/update/add"}}
}}
"""


def test_arrays_of_the_forward_pass_that_the_backward_pass_reads():
    # The carries of the loop once, though they are copied, and x. Not what is on the chip, not the
    # parameters, nor what the backward pass makes itself.
    assert activation_bytes(Module.parse(PROGRAM)) == 2 * 12 * 4 * 16 + 2 * 4 * 16
