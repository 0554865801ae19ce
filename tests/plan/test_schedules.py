"""Bundles of kernels written by hand, loops multiplied out, and the floor that they make."""

from mmjax.chips import CHIPS
from mmjax.plan.hlo import Module
from mmjax.plan.schedules import count_bundles, floor_of, read_schedules, with_kernels
from mmjax.plan.totals import add_up

# Ten bundles: three before, a loop of three around a loop of two that turns 4 times, and two after.
KERNEL = """\
= control target key start
LB: loop body
= control target key end

     0   :  { %s0 = inlined_call_operand.hbm [shape: f32[8], index: 0] /* Start region 9 */
   0x1   :  {}
   0x2   :  { %7 = vsyncpa [#allocation3], 0 }
   0x3 LB: > { %s1 = sphi 0, %s2 } /* Start region 1 :: Start region 5 */
   0x4 LB: > > { %v1 = vld [vmem:[%s0]] } /* Start region 2 */
   0x5   : > > { %p1 = scmp.ge.s32.totalorder %s3, 4 /* loop exit test */ ;; \
%8 = sbr.rel (!%p1) target = $region2 }
   0x6   : > { %p2 = scmp.ge.s32.totalorder %s1, 7 /* loop exit test */ }
   0x7   : > { %9 = sbr.rel (!%p2) target = $region5 }
   0x8   :  {}
   0x9   :  {}
"""
PROGRAM = """\
HloModule jit_step

%condition (c: (s32[], f32[6,1000])) -> pred[] {
  %c = (s32[], f32[6,1000]{1,0}) parameter(0)
  %six = s32[] constant(6)
  ROOT %less = pred[] compare(%c, %six), direction=LT
}

%taking (p: f32[6,1000]) -> f32[1,1000] {
  %p = f32[6,1000]{1,0} parameter(0)
  ROOT %part = f32[1,1000]{1,0} dynamic-slice(%p)
}

%body (b: (s32[], f32[6,1000])) -> (s32[], f32[6,1000]) {
  %b = (s32[], f32[6,1000]{1,0}) parameter(0)
  %stack = f32[6,1000]{1,0} get-tuple-element(%b), index=1
  %row = f32[1,1000]{1,0:S(1)} fusion(%stack), calls=%taking, config={"estimated_cycles":"9"}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[100000]{0} parameter(0)
  %loop = (s32[], f32[6,1000]{1,0}) while(%x), condition=%condition, body=%body
  %wide = f32[100000]{0} fusion(%x), calls=%none, backend_config={"estimated_cycles":"5"}
  %kernel = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call"
  ROOT %plain = f32[8]{0} add(%x, %x), backend_config={"estimated_cycles":"30"}
}
"""
BYTES_PER_CYCLE = 819e9 / 1.5e9  # of a v5e


def test_bundles_count_as_often_as_their_loops_turn():
    assert count_bundles(KERNEL.splitlines()) == 3 + 7 * (3 + 4 * 2) + 2


def test_a_loop_without_a_constant_counts_once():
    unknown = KERNEL.replace("%s3, 4 /* loop", "%s3, %s4 /* loop")
    assert count_bundles(unknown.splitlines()) == 3 + 7 * (3 + 2) + 2


def test_equal_kernels_are_found_by_every_name(tmp_path):
    (tmp_path / "17-fusion.8-01-final_bundles.txt").write_text(KERNEL)
    (tmp_path / "17-fusion.8-00-schedule-analysis_final_bundles.txt").write_text("0x1 : {}")
    (tmp_path / "17-TLP-00-deduplication-map.txt").write_text(
        "key:fusion.8\nordinal:1\nequivalent_hlos[size=2]:\n  fusion.8\n  fusion.9\n"
        "key:other\nordinal:2\nequivalent_hlos[size=1]:\n  copy.1\n"
    )
    assert read_schedules(tmp_path) == {"fusion.8": 82, "fusion.9": 82}


def test_an_op_takes_the_larger_of_its_bundles_and_its_traffic():
    module = Module.parse(PROGRAM)
    known = {"wide": 10, "kernel": 4000}
    floor = add_up(module, floor_of(module, known, CHIPS["v5e"]))
    wide = round(2 * 4 * 100_000 / BYTES_PER_CYCLE)  # read and written
    row = 6 * 9  # no kernel of its own: the estimate
    assert floor.cycles.total() == row + wide + 4000 + 30
    assert not floor.kernels
    assert floor.kernel_cycles.total() == 4000


def test_a_loop_reads_a_slice_of_what_is_stacked_over_its_turns():
    module = Module.parse(PROGRAM)
    floor = add_up(module, floor_of(module, {"row": 1}, CHIPS["v5e"]))
    slice_ = round(4 * 1000 / BYTES_PER_CYCLE)  # what is written stays on the chip
    assert floor.cycles.total() == 6 * slice_ + 5 + 30
    assert floor.kernels == {"kernel": 1}


def test_the_estimate_takes_custom_kernels_from_their_schedules():
    module = Module.parse(PROGRAM)
    floor = floor_of(module, {"wide": 10, "kernel": 4000}, CHIPS["v5e"])
    assert add_up(module, with_kernels(floor)).cycles.total() == 6 * 9 + 5 + 4000 + 30
