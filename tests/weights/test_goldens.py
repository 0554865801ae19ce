"""Recorded classes of `transformers`: loaded, run, differentiated, written back."""

from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import mmjax
from mmjax.weights.files import open_tensors
from mmjax.weights.names import to_theirs
from mmjax.weights.saving import family_of
from tests.cases import CASES, compare

GOLDENS = Path(__file__).parents[1] / "goldens"
RECORDED = [case for case in CASES if case.recorded]


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: case.name)
def test_agrees_with_the_recording(case, tmp_path):
    model = mmjax.load(GOLDENS / case.name)
    recorded = load_file(GOLDENS / case.name / "case.safetensors")
    inputs, outputs, gradients = (_under(recorded, part) for part in ("in/", "out/", "gradient/"))

    found = compare.run(model, inputs)
    for name, expected in outputs.items():
        atol = 1e-4 * max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(found[name], expected, atol=atol, err_msg=name)

    gradient = _on_disk(compare.gradients(model, inputs, sorted(outputs)))
    largest = max(gradients.values())
    for name, array in gradient.items():
        if name not in gradients:  # statistics, which are no parameters there
            assert not array.any(), name
            continue
        # What is zero but for rounding is held to the size of the whole gradient.
        tolerance = 1e-3 * max(float(gradients[name]), 1e-4 * float(largest))
        assert abs(np.linalg.norm(array) - gradients[name]) < tolerance, name

    mmjax.save_huggingface(model, tmp_path)
    before, after = open_tensors(GOLDENS / case.name), open_tensors(tmp_path)
    assert not set(after) - set(before)
    for name in after:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)


def test_every_golden_is_tested():
    recorded = {folder.name for folder in GOLDENS.iterdir() if (folder / "config.json").exists()}
    assert recorded == {case.name for case in RECORDED}


def _under(arrays, prefix):
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}


def _on_disk(model):
    return to_theirs(family_of(model).table(model.config), nnx.to_pure_dict(nnx.state(model)))
