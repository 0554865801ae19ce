"""What ops written by hand move to and from HBM."""

import pytest

from mmjax.plan.hlo import Module
from mmjax.plan.traffic import traffic

PROGRAM = """\
HloModule jit_step

%taking (p: f32[6,1000], n: s32[]) -> f32[1,1000] {
  %p = f32[6,1000]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %b = f32[6,1000]{1,0} bitcast(%p)
  ROOT %part = f32[1,1000]{1,0} dynamic-slice(%b, %n, %n), dynamic_slice_sizes={1,1000}
}

%putting (q: f32[6,1000], m: s32[], new: f32[1,1000]) -> (f32[6000], f32[1,1000]) {
  %q = f32[6,1000]{1,0} parameter(0)
  %m = s32[] parameter(1)
  %new = f32[1,1000]{1,0} parameter(2)
  %twice = f32[1,1000]{1,0} add(%new, %new)
  %put = f32[6,1000]{1,0} dynamic-update-slice(%q, %twice, %m, %m)
  %flat = f32[6000]{0} bitcast(%put)
  ROOT %both = (f32[6000]{0}, f32[1,1000]{1,0}) tuple(%flat, %twice)
}

%nested (r: f32[6,1000], k: s32[]) -> f32[1,1000] {
  %k = s32[] parameter(1)
  %r = f32[6,1000]{1,0} parameter(0)
  %inner = f32[1,1000]{1,0} fusion(%r, %k), kind=kLoop, calls=%taking
  ROOT %negative = f32[1,1000]{1,0} negate(%inner)
}

%summing (t: f32[6,1000], j: s32[]) -> f32[1,1000] {
  %t = f32[6,1000]{1,0} parameter(0)
  %j = s32[] parameter(1)
  %some = f32[1,1000]{1,0} dynamic-slice(%t, %j, %j), dynamic_slice_sizes={1,1000}
  %all = f32[1000]{0} reduce(%t, %j), to_apply=%sum
  ROOT %sum = f32[1,1000]{1,0} add(%some, %all)
}

ENTRY %main (x: f32[6,1000], i: s32[]) -> f32[8] {
  %x = f32[6,1000]{1,0} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  %row = f32[1,1000]{1,0} fusion(%x, %i), kind=kLoop, calls=%taking
  %kept = f32[1,1000]{1,0:S(1)} fusion(%x, %i), kind=kLoop, calls=%taking
  %again = f32[1,1000]{1,0} fusion(%x, %i), kind=kLoop, calls=%nested
  %stacked = (f32[6000]{0}, f32[1,1000]{1,0}) fusion(%x, %i, %row), kind=kLoop, calls=%putting
  %whole = f32[1,1000]{1,0} fusion(%x, %i), kind=kLoop, calls=%summing
  %moved = f32[6,1000]{0,1} copy(%x)
  %update = f32[6,1000]{1,0} dynamic-update-slice(%x, %row, %i, %i)
  %unknown = f32[6,1000]{1,0} fusion(%x), kind=kLoop, calls=%elsewhere
  ROOT %room = f32[6,1000]{1,0} custom-call(), custom_call_target="AllocateBuffer"
}
"""
ROW, ALL, SCALAR = 4 * 1000, 4 * 6000, 4


@pytest.mark.parametrize(
    ("op", "moved"),
    [
        ("row", ROW + ROW + SCALAR),  # read, written, and the number of the row
        ("kept", ROW + SCALAR),  # what is written stays on the chip
        ("again", ROW + ROW + SCALAR),
        ("stacked", ROW + ROW + ROW + SCALAR),  # one row in, one into the stack, one beside it
        ("whole", ALL + ROW + SCALAR),  # a part of it, and then all
        ("moved", ALL + ALL),
        ("update", ROW + ROW + 2 * SCALAR),
        ("unknown", ALL + ALL),
        ("room", 0),
    ],
)
def test_an_op_moves_what_it_touches(op, moved):
    module = Module.parse(PROGRAM)
    assert traffic(module, module.ops[op]) == moved
