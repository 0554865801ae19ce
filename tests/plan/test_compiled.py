"""What libtpu makes of real programs, where it is installed: its numbers beside ours."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmjax.chips import CHIPS, GIB
from mmjax.errors import InputError
from mmjax.objectives.geometry import SAMPLE
from mmjax.plan.topology import find_topology
from tests.plan import tpu_programs

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = "--config=configs/pretrain/siglip_b16.py:tiny"
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra 'plan')"
)


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=REPOSITORY,
        env=os.environ | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=False,
    )


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "chips", "devices"),
    [
        ("v4:2x2x1", 4, 4),
        ("v5e:1x1", 1, 1),
        ("v5e:16x16", 256, 256),
        ("v5p:8x16x16", 2048, 2048),
        ("v6e:16x16", 256, 256),
        ("tpu7x:4x4x4", 64, 128),
    ],
)
def test_chips_and_devices_of_a_topology(name, chips, devices):
    topology = find_topology(name)
    assert (topology.chips, len(topology.devices)) == (chips, devices)
    assert topology.chip.devices * chips == devices
    assert topology.devices[0].device_kind in topology.chip.device_kinds


@pytest.mark.parametrize("name", ["v5f:2x2", "v5e", "v5e:16", "v5e:2by2", ""])
def test_what_is_no_topology(name):
    with pytest.raises(InputError, match=r"--topology="):
        find_topology(name)


@needs_libtpu
def test_a_shape_that_libtpu_does_not_have():
    with pytest.raises(InputError, match=r"--topology=v5e:3x5.*divisible"):
        find_topology("v5e:3x5")


def test_without_libtpu_the_way_to_it_is_told(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'mmjax\[plan\]'"):
        find_topology("v5e:2x2")


@pytest.fixture(scope="module")
def known():
    """What libtpu says of every chip."""
    result = run("tests.plan.tpu_programs")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.slow
@needs_libtpu
def test_a_scanned_product_with_a_gather_in_it(tmp_path):
    result, program = run("tests.plan.tpu_programs", str(tmp_path)), tpu_programs
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["collectives"] == {"all-gather": program.LAYERS}
    assert found["all_gather"] == program.LAYERS * program.WIDTH**2 * 2
    flops = program.LAYERS * 2 * program.ROWS * program.WIDTH**2
    best = flops / (CHIPS["v5e"].peak_flops / CHIPS["v5e"].clock)
    # The schedule of a plain product is within a few percent of what the matrix unit can do.
    assert best < found["floor"] < 1.05 * best
    assert found["floor"] < found["estimate"] < 1.3 * best
    assert found["unread_loops"] == []


@pytest.mark.slow
@needs_libtpu
@pytest.mark.xdist_group("known")
@pytest.mark.parametrize("generation", CHIPS)
def test_clocks_and_peaks_are_the_compilers(known, generation):
    chip = CHIPS[generation]
    best = 2 * tpu_programs.SIDE**3 / (chip.peak_flops / chip.devices / chip.clock)
    assert best < known["matrix_product"][generation] < 1.25 * best


@pytest.mark.slow
@needs_libtpu
@pytest.mark.xdist_group("known")
@pytest.mark.parametrize("generation", CHIPS)
def test_a_program_may_have_as_much_hbm_as_libtpu_says(known, generation):
    chip = CHIPS[generation]
    assert chip.devices * known["available_hbm"][generation] * GIB == chip.hbm_bytes


@pytest.mark.slow
@needs_libtpu
def test_a_plan_for_2048_chips_is_json_and_nothing_else():
    result = run(
        "mmjax.plan", RECIPE, "--topology=v5p:8x16x16", "--config.batch_size=4096", "--json"
    )
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert list(plan) == [
        *("topology", "chips", "batch_size", "parameters", "flops_per_step", "hbm_bytes"),
        *("cycles", "mfu", "collective_bytes", "counted_kernels", "uncounted_kernels"),
        *("unread_loops", "fits"),
    ]
    assert list(plan["hbm_bytes"]) == [
        *("arguments", "temporary", "output", "alias", "peak", "limit")
    ]
    assert plan["chips"] == 2048
    assert plan["fits"]
    assert plan["cycles"]["estimate"] > 0
    assert plan["cycles"]["floor"] is None
    assert 0 < plan["mfu"]["low"] < 1
    # Every gradient is summed over the chips, in float32.
    assert plan["collective_bytes"]["all-reduce"] > 0


def bytes_moved(recipe, topology, rows):
    """Bytes a chip and step, by kind of collective."""
    config = f"--config=configs/pretrain/{recipe}.py:tiny"
    flags = [config, f"--topology={topology}", f"--config.batch_size={rows}", "--json"]
    result = run("mmjax.plan", *flags)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)["collective_bytes"]


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("recipe", ["siglip_b16", "coattention_b16"])
def test_more_rows_gather_no_activations(recipe):
    """Of a row of the batch only its embeddings go to every device: some hundred bytes of them."""
    few, many = SAMPLE, 2 * SAMPLE  # whose spectrum is logged, and is gathered
    gathered = [bytes_moved(recipe, "v5e:2x2", rows)["all-gather"] for rows in (few, many)]
    layer_of_a_row = (64 // 16) ** 2 * 32 * 4  # tokens, width, bytes
    assert (gathered[1] - gathered[0]) / (many - few) < layer_of_a_row / 4


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "collective"), [("v5e:8x8", "all-to-all"), ("v5p:2x2x2", "ragged-all-to-all")]
)
def test_partners_travel_on_every_pod(topology, collective):
    """Not all have the collective for it: the flagship's step compiles where it is missing."""
    moved = bytes_moved("coattention_b16", topology, 128)
    assert moved[collective] > 0
    assert ("ragged-all-to-all" in moved) == (collective == "ragged-all-to-all")


@pytest.mark.slow
@needs_libtpu
def test_a_plan_with_both_readings():
    result = run("mmjax.plan", RECIPE, "--topology=v5e:2x2", "--schedules", "--json")
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert 0 < plan["cycles"]["floor"] < plan["cycles"]["estimate"]
    assert plan["mfu"]["low"] < plan["mfu"]["high"]


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology=v5e:4x4", "--config.batch_size=24"], "does not split over"),
        (["--topology=v5x:4x4"], "no such TPU"),
        (["--topology=v5e:2x2", "--config.mesh.fsdp=3"], "there are 4"),
    ],
)
def test_bad_input_ends_in_its_message(flags, message):
    result = run("mmjax.plan", RECIPE, *flags)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
