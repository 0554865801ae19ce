"""Every family beside its class of `transformers`, on random weights and inputs."""

import numpy as np
import pytest

import mmjax
from tests.cases import CASES, compare
from tests.parity import torch_side
from tests.records import keep

OUTPUTS = 1e-4  # absolute, of outputs of order 1
GRADIENTS = 1e-3  # relative, by norm, of every parameter


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_transformers(case, seed, tmp_path):
    theirs = torch_side.build(case, seed)
    theirs.save_pretrained(tmp_path / "theirs")
    model = mmjax.load(tmp_path / "theirs")
    inputs = case.inputs(np.random.default_rng(seed))

    expected = torch_side.outputs(case, theirs, inputs)
    found = compare.run(model, inputs)
    assert not expected.keys() - found.keys()
    differences = {
        name: np.abs(found[name] - value.detach().numpy()).max()
        / max(1, float(value.detach().abs().max()))
        for name, value in expected.items()
    }
    assert max(differences.values()) < OUTPUTS, differences

    mmjax.save_huggingface(model, tmp_path / "ours")
    again = torch_side.load(case, tmp_path / "ours")
    weights = dict(theirs.named_parameters())
    for name, value in again.named_parameters():
        assert np.array_equal(value.detach().numpy(), weights[name].detach().numpy()), name
    for name, value in torch_side.outputs(case, again, inputs).items():
        np.testing.assert_allclose(
            value.detach().numpy(), expected[name].detach().numpy(), atol=1e-5, err_msg=name
        )

    # A gradient written as if it were weights comes back under their names in memory.
    mmjax.save_huggingface(
        compare.gradients(model, inputs, sorted(expected)), tmp_path / "gradient"
    )
    ours = dict(torch_side.load(case, tmp_path / "gradient").named_parameters())
    gradient = torch_side.gradients(expected, theirs)
    largest = max(np.linalg.norm(g) for g in gradient.values())
    norms = {name: max(np.linalg.norm(g), 1e-4 * largest) for name, g in gradient.items()}
    distances = {
        name: np.linalg.norm(ours[name].detach().numpy() - g) / norms[name]
        for name, g in gradient.items()
    }
    assert max(distances.values()) < GRADIENTS, distances
    # A key's bias has a gradient of zero but for rounding: softmax does not see a shift.
    telling = [name for name, g in gradient.items() if np.linalg.norm(g) > 1e-4 * largest]
    keep(
        case.name,
        against=case.kind,
        outputs=max(differences.values()),
        gradients=max(distances[name] for name in telling),
    )
