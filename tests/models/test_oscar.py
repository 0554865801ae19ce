"""Oscar: captions, two pictures, one classifier."""

from dataclasses import replace

import numpy as np
import pytest
from flax import nnx

from mmjax.errors import InputError
from mmjax.models.oscar import Oscar, OscarConfig
from mmjax.models.regions import StreamConfig
from tests.models import reference
from tests.models.test_regions import TEXT, batch, build

CONFIG = OscarConfig(StreamConfig(**TEXT), region_width=6)


def reasoner(**fields):
    config = replace(CONFIG, reasoning=True, **fields)
    return nnx.merge(*reference.split(lambda: Oscar(config, nnx.Rngs(0))))


def two_pictures():
    first, second = (batch(seed=seed) for seed in (1, 2))
    return first | {f"{name}_b": array for name, array in second.items()}


def test_a_full_mask_can_say_what_the_others_say():
    model, inputs = build("oscar"), batch()
    mask = np.concatenate([inputs.pop("text_mask"), inputs.pop("region_mask")], axis=1)
    both = {"text_mask": mask[:, :7], "region_mask": mask[:, 7:]}
    expected, found = (
        model(**inputs, **both),
        model(**inputs, attention_mask=np.broadcast_to(mask[:, None], (3, 12, 12))),
    )
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5, err_msg=name)


def test_a_caption_is_written_from_left_to_right():
    """Its four words look back, the other three and the regions never at it."""
    model, inputs = build("oscar"), batch(lengths=(7, 7), counts=(5, 5))
    mask = np.ones((2, 12, 12), bool)
    mask[:, :4, :4] = np.tri(4, dtype=bool)
    mask[:, 4:, :4] = False
    inputs = {name: array for name, array in inputs.items() if "mask" not in name}
    before = model(**inputs, attention_mask=mask)
    inputs["text"][:, 2] = 29 - inputs["text"][:, 2]
    after = model(**inputs, attention_mask=mask)
    moved = np.abs(after["sequence_output"] - before["sequence_output"]).max(axis=(0, 2))
    assert (moved[[2, 3]] > 1e-3).all()
    assert (moved[[0, 1, 4, 5, 6]] == 0).all()
    np.testing.assert_array_equal(after["region_output"], before["region_output"])


@pytest.mark.parametrize("fields", [{}, {"classifier": "mlp", "region_epsilon": 1e-5}], ids=str)
def test_both_pictures_count_and_their_texts_too(fields):
    model, inputs = reasoner(**fields), two_pictures()
    out = model(**inputs)
    assert out["nlvr_logits"].shape == (3, 2)
    for name in ("text", "regions", "text_b", "regions_b"):
        changed = model(**inputs | {name: inputs[name][::-1]})["nlvr_logits"]
        assert np.abs(changed - out["nlvr_logits"]).max() > 1e-3, name


def test_a_second_picture_needs_a_head_and_a_head_needs_it():
    with pytest.raises(InputError, match="no head for two pictures"):
        build("oscar")(**two_pictures())
    inputs = two_pictures()
    del inputs["text_b"]
    for given in (inputs, batch()):
        with pytest.raises(InputError, match="give text_b, regions_b and boxes_b"):
            reasoner()(**given)


def test_what_cannot_be_built_is_refused():
    with pytest.raises(InputError, match="one of answers, matching and reasoning"):
        replace(CONFIG, matching=True, answers=("no", "yes"))
    with pytest.raises(InputError, match=r"classifier is 'mpl'.*Did you mean mlp"):
        replace(CONFIG, classifier="mpl")
