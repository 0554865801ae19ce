"""UNITER: masked regions, two pictures."""

from dataclasses import replace

import numpy as np
import pytest
from flax import nnx

from mmjax.errors import InputError
from mmjax.models.regions import StreamConfig
from mmjax.models.uniter import Uniter, UniterConfig
from tests.models import reference
from tests.models.test_regions import TEXT, batch, build

CONFIG = UniterConfig(StreamConfig(**TEXT, types=3), region_width=6)


def reasoner(kind):
    config = replace(CONFIG, reasoning=kind)
    return nnx.merge(*reference.split(lambda: Uniter(config, nnx.Rngs(0))))


def two_pictures(swapped=False):
    first, second = (batch(seed=seed) for seed in (1, 2))
    regions = ("regions", "boxes", "region_mask")
    if swapped:
        first, second = first | {name: second[name] for name in regions}, first
    return first | {f"{name}_b": second[name] for name in regions}


def test_features_behind_a_mask_are_not_seen():
    model, inputs = build("uniter"), batch()
    masked = np.zeros((3, 5), bool)
    masked[:, 1] = True
    plain = model(**inputs)["region_output"]
    hidden = model(**inputs, region_masked=masked)["region_output"]
    assert np.abs(plain - hidden).max() > 0.1
    inputs["regions"][:, 1] += 3
    again = model(**inputs, region_masked=masked)["region_output"]
    np.testing.assert_array_equal(again, hidden)


@pytest.mark.parametrize("kind", ["paired", "paired_attention", "triplet"])
def test_both_pictures_count_and_their_order_too(kind):
    model = reasoner(kind)
    logits = model(**two_pictures())["nlvr_logits"]
    assert logits.shape == (3, 2)
    assert np.abs(logits - model(**two_pictures(swapped=True))["nlvr_logits"]).max() > 1e-2
    for name in ("regions", "regions_b"):
        inputs = two_pictures()
        inputs[name] = inputs[name] + 1
        assert np.abs(logits - model(**inputs)["nlvr_logits"]).max() > 1e-3, name


@pytest.mark.parametrize("kind", ["paired", "paired_attention", "triplet"])
def test_padding_of_either_picture_changes_nothing(kind):
    model, inputs = reasoner(kind), two_pictures()
    expected = model(**inputs)["nlvr_logits"]
    for name in ("regions", "boxes", "region_mask"):
        array = inputs[f"{name}_b"]
        widths = [(0, 0), (0, 3)] + [(0, 0)] * (array.ndim - 2)
        inputs[f"{name}_b"] = np.pad(array, widths, constant_values=False)
    np.testing.assert_allclose(model(**inputs)["nlvr_logits"], expected, atol=1e-5)


def test_masks_may_be_left_out():
    """Of inputs without padding."""
    model, inputs = reasoner("paired_attention"), two_pictures()
    bare = {name: array for name, array in inputs.items() if "mask" not in name}
    full = {name: np.ones_like(array) for name, array in inputs.items() if "mask" in name}
    expected = model(**bare | full)["nlvr_logits"]
    np.testing.assert_allclose(model(**bare)["nlvr_logits"], expected, atol=1e-6)


def test_a_second_picture_needs_a_head_and_a_head_needs_it():
    with pytest.raises(InputError, match="no head for two pictures"):
        build("uniter")(**two_pictures())
    inputs = two_pictures()
    del inputs["boxes_b"]
    for given in (inputs, batch()):
        with pytest.raises(InputError, match="give regions_b and boxes_b"):
            reasoner("paired")(**given)


def test_what_cannot_be_built_is_refused():
    with pytest.raises(InputError, match=r"reasoning is 'pair'.*Did you mean paired"):
        replace(CONFIG, reasoning="pair")
    with pytest.raises(InputError, match=r"text\.types is 2.*give 3"):
        replace(CONFIG, text=StreamConfig(**TEXT), reasoning="triplet")
