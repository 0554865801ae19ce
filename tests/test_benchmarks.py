"""The benchmarks run, and say what they need where they cannot."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.compilation import QUICKLY

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--width=64", "--depth=1", "--pixels=64", "--batch=4", "--words=99", "--threads=1"]


def call(name, *arguments, **environment):
    return subprocess.run(
        [sys.executable, f"benchmarks/{name}.py", *map(str, arguments)],
        cwd=ROOT,
        # One device: the tests' own flags show jax eight.
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICKLY, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_without_a_gpu_its_benchmark_says_so():
    ended = call("gpu", "--models=B/32")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: benchmarks/gpu.py is for a GPU, and jax has a cpu here")
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_the_gpu_benchmark_runs_the_real_step_at_toy_size(tmp_path):
    flags = ["--tiny", "--models=B/16", "--remats=full", "--runs=2"]
    ended = call("gpu", *flags, "--first_batch=4", "--last_batch=8", f"--output={tmp_path / 'x'}")
    assert ended.returncode == 0, ended.stderr
    *ran, refused = json.loads((tmp_path / "x").read_text())
    assert [row["batch"] for row in ran] == [4, 8]
    for row in ran:
        assert row["mfu"] is None  # of a device whose peak nobody knows
        assert row["pairs_per_second"] == pytest.approx(row["batch"] / row["seconds"])
        assert row["compiler_gib"] > 0
    # Twice the batch: twice the products, and four times those of all pairs.
    assert 2 < ran[1]["model_tflops"] / ran[0]["model_tflops"] < 2.2
    assert refused["attention"] == "cudnn"  # it is not here, which is told and ends nothing
    assert "| B/16 | cudnn | full | refused |" in ended.stdout


@pytest.mark.parametrize("name", ["step", "products"])
def test_without_torch_the_comparison_says_what_to_install(name, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch')\n")
    ended = call(name, PYTHONPATH=str(tmp_path))
    assert ended.returncode == 2
    assert "pip install -e '.[parity]'" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_products_are_the_same_in_both():
    pytest.importorskip("torch")
    from benchmarks.products import products

    for name, ours, theirs in products(rows=5, inputs=4, outputs=3):
        expected = theirs().T if name == "kernel's gradient" else theirs()
        np.testing.assert_allclose(ours(), expected, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("flag", "told"),
    [("--width=100", "--width is 100"), ("--threads=0", "--threads is 0"), ("--remat=all", "all")],
)
def test_options_that_cannot_be_are_refused(flag, told):
    pytest.importorskip("torch")
    ended = call("step", *SMALL, flag)
    assert ended.returncode == 2
    assert told in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_the_same_step_in_torch_has_our_loss_and_gradient(tmp_path):
    pytest.importorskip("torch")
    ended = call("step", *SMALL, "--runs=1", f"--output={tmp_path / 'x'}")
    assert ended.returncode == 0, ended.stderr
    for result in json.loads((tmp_path / "x").read_text()):
        loss, norm = result["first_loss"], result["first_gradient_norm"]
        assert loss["ours"] == pytest.approx(loss["torch"], abs=1e-4)
        assert norm["ours"] == pytest.approx(norm["torch"], rel=1e-3)
        assert len(result["seconds"]["ours"]) == len(result["seconds"]["torch"]) == 1
    assert "| flagship | torch |" in ended.stdout
