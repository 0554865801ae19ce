"""What a plan says, against numbers worked out by hand."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict

from mmjax.chips import CHIPS, GIB
from mmjax.plan.compiler import CompiledStep, Memory
from mmjax.plan.plan import Plan
from mmjax.plan.report import format_plan, format_trials
from mmjax.plan.search import Trial
from mmjax.plan.topology import Topology
from mmjax.plan.totals import Totals


def topology(generation, chips):
    """Chips in a row."""
    chip = CHIPS[generation]
    devices = [SimpleNamespace(coords=(i, 0, 0)) for i in range(chips) for _ in range(chip.devices)]
    return Topology(f"{generation}:{chips}x1", chip, devices)


def step(where, memory, text="HloModule"):
    return CompiledStep(
        topology=where,
        config=ConfigDict({"batch_size": 512, "total_steps": 3600}),
        mesh={"data": len(where.devices), "fsdp": 1, "tensor": 1},
        parameters={"image": 1_000_000, "text": 200_000},
        state_bytes={"parameters": GIB, "optimizer": 2 * GIB},
        flops=4 * 197e12,
        memory=memory,
        text=text,
    )


@pytest.fixture
def plan():
    """Four v5e chips for 4 s by the estimate and 2 s by the floor: 25 and 50 % of their peak."""
    memory = Memory(
        arguments=4 * GIB, temporary=5 * GIB, output=3 * GIB, alias=3 * GIB, peak=9 * GIB,
        limit=int(15.75 * GIB),
    )  # fmt: skip
    estimate = Totals(
        cycles=Counter({("image", "attention", "core"): 4_500_000_000, ("update",): 1_500_000_000}),
        collective_bytes=Counter({"all-reduce": 400_000_000}),
        collective_runs=Counter({"all-reduce": 7}),
        kernels=Counter({"image/attention/core/kernel": 12}),
    )
    floor = Totals(
        cycles=Counter({("image", "attention", "core"): 3_000_000_000}),
        kernel_cycles=Counter({"image/attention/core/kernel": 2_000_000_000}),
    )
    return Plan(step(topology("v5e", 4), memory), estimate, floor, activations=2 * GIB)


def test_the_two_readings_bracket_the_mfu(plan):
    assert plan.as_json()["mfu"] == {"low": pytest.approx(0.25), "high": pytest.approx(0.5)}
    assert plan.as_json()["cycles"] == {"estimate": 6_000_000_000, "floor": 3_000_000_000}


def test_a_chip_of_two_devices_has_the_memory_and_traffic_of_both():
    totals = Totals(cycles=Counter({("image",): 2_200_000_000}),
                    collective_bytes=Counter({"all-gather": 5}))  # fmt: skip
    memory = Memory(0, 0, 0, 0, peak=0, limit=int(CHIPS["tpu7x"].hbm_bytes))
    of_pairs = Plan(step(topology("tpu7x", 4), memory), totals)
    found = of_pairs.as_json()
    assert found["chips"] == 4
    assert found["collective_bytes"] == {"all-gather": 10}
    # A second of four chips.
    assert found["mfu"]["low"] == pytest.approx(4 * 197e12 / (4 * 2307e12))


def test_a_kernel_counts_as_uncounted_only_where_no_schedule_tells(plan):
    assert plan.as_json()["uncounted_kernels"] == {}
    assert plan.as_json()["counted_kernels"] == {"image/attention/core/kernel": 2_000_000_000}
    assert "by their schedules: image/attention/core/kernel 2,000.00 M." in format_plan(plan, "x")
    estimated = Plan(plan.step, plan.estimate)
    assert estimated.as_json()["uncounted_kernels"] == {"image/attention/core/kernel": 12}
    text = format_plan(estimated, "a recipe")
    assert "image/attention/core/kernel (12 runs)" in text
    assert "--schedules" in text


def test_the_page(plan):
    text = format_plan(plan, "a recipe", price_per_chip_hour=1.5)
    rows = {line.split("  ")[0]: line.split()[-2:] for line in text.splitlines() if "  " in line}
    assert rows["all"] == ["3,000.00", "100.0%"]
    assert rows["image / attention / core"] == ["3,000.00", "100.0%"]
    assert rows["seconds a step"] == ["4", "2"]
    assert rows["samples/s"] == ["128", "256"]
    assert rows["hours of 3,600 steps"] == ["4.0", "2.0"]
    assert rows["chip-hours"] == ["16", "8"]
    assert rows["price at 1.5 a chip-hour"] == ["24", "12"]
    assert rows["activations, and casts of weights"][-1] == "2.00"
    assert rows["temporary: gradients, work"][-1] == "3.00"
    assert rows["all-reduce"] == ["400.0", "2.00"]  # MB, and ms at 200 GB/s one way
    assert "not a measurement" in text
    assert "Fits: 43% of the HBM is left." in text


def test_a_step_that_the_compiler_refuses_has_no_readings():
    memory = Memory(None, None, None, None, peak=20 * GIB, limit=int(15.75 * GIB))
    refused = Plan(step(topology("v5e", 4), memory, text=""), None)
    found = json.loads(json.dumps(refused.as_json()))
    assert found["fits"] is False
    assert found["cycles"] == {"estimate": None, "floor": None}
    assert found["hbm_bytes"]["arguments"] is None
    assert "Does not fit: a chip needs 20.00 GiB and has 15.75." in format_plan(refused, "a recipe")


def test_trials_name_the_change_that_helps():
    def planned(fits, gib, cycles):
        return {"fits": fits, "hbm_bytes": {"peak": gib * GIB}, "cycles": {"estimate": cycles}}

    trials = [
        Trial(("--config.model.remat=dots",), planned(False, 20, None)),
        Trial(("--config.model.remat=full",), planned(True, 9, 7_000_000)),
        Trial(("--config.mesh.fsdp=4",), None),
    ]
    text = format_trials(trials)
    assert "Fits with --config.model.remat=full" in text
    assert "Fits with --config.model.remat=dots" not in text
    assert "no run" in text
    assert "None of it" in format_trials(trials[:1])
