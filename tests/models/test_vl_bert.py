"""VL-BERT: the whole picture, texts alone, answers."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.errors import InputError
from mmjax.models.vl_bert import VlBert, VlBertConfig, VlBertTextConfig
from tests.models import reference
from tests.models.test_regions import TEXT, batch, build

CONFIG = VlBertConfig(VlBertTextConfig(**TEXT), region_width=6, box_width=4, texts_alone=True)


def made(config):
    return nnx.merge(*reference.split(lambda: VlBert(config, nnx.Rngs(0))))


def test_words_see_the_whole_picture_whether_or_not_they_look_at_it():
    model, inputs = build("vl_bert"), batch()
    inputs["region_mask"] = np.zeros_like(inputs["region_mask"])
    before = model(**inputs)["sequence_output"]
    for region, is_seen in ((0, True), (1, False)):
        regions = inputs["regions"].copy()
        regions[:, region] += 1
        moved = np.abs(model(**inputs | {"regions": regions})["sequence_output"] - before).max()
        assert (moved > 1e-2) == is_seen


def test_a_text_alone_has_a_picture_of_its_own():
    """As with one that has no regions and looks like that."""
    model, inputs = made(CONFIG), batch()
    words = {name: inputs[name] for name in ("text", "text_mask", "text_type")}
    alone = model(**words)
    assert alone["region_output"].shape == (3, 0, 24)
    picture = jnp.abs(model.no_picture[...])
    model.no_picture[...] = picture
    projection = model.region_embeddings.projection
    projection.kernel[...] = jnp.zeros_like(projection.kernel[...])
    projection.bias[...] = picture
    expected = model(**inputs | {"region_mask": np.zeros_like(inputs["region_mask"])})
    found = model(**words)["sequence_output"]
    np.testing.assert_allclose(found, expected["sequence_output"], atol=1e-5)
    assert np.abs(found - alone["sequence_output"]).max() > 1e-2


def test_without_a_picture_it_must_know_texts_alone():
    words = {name: batch()[name] for name in ("text", "text_mask")}
    with pytest.raises(InputError, match=r"needs regions and boxes; with config\.texts_alone"):
        build("vl_bert")(**words)
    with pytest.raises(InputError, match="needs regions and boxes"):
        made(CONFIG)(**words, regions=batch()["regions"])


def test_features_behind_a_mask_are_not_seen():
    model, inputs = build("vl_bert"), batch()
    masked = np.zeros((3, 5), bool)
    masked[:, 1] = True
    hidden = model(**inputs, region_masked=masked)["region_output"]
    assert np.abs(model(**inputs)["region_output"] - hidden).max() > 0.1
    inputs["regions"][:, 1] += 3
    np.testing.assert_array_equal(model(**inputs, region_masked=masked)["region_output"], hidden)
    with pytest.raises(InputError, match=r"no masks for regions: config\.region_classes"):
        made(CONFIG)(**batch(), region_masked=masked)


@pytest.mark.parametrize("fields", [{}, {"classifier": "2fc", "classifier_width": 10}], ids=str)
def test_the_answer_is_read_at_the_last_word(fields):
    config = replace(CONFIG, answers=("no", "yes"), **fields)
    model, inputs = made(config), batch()
    out = model(**inputs)
    lengths = inputs["text_mask"].sum(axis=1)
    words = np.asarray(out["sequence_output"])[np.arange(3), lengths - 2]
    np.testing.assert_allclose(out["vqa_logits"], model.answering(jnp.array(words)), atol=1e-6)


def test_there_is_room_behind_the_text():
    config = replace(CONFIG, text=replace(CONFIG.text, max_length=9))
    made(config)(**batch())
    config = replace(CONFIG, text=replace(CONFIG.text, max_length=8))
    with pytest.raises(InputError, match=r"7 tokens.* 9, and text\.max_length is 8"):
        made(config)(**batch())


def test_a_pooler_may_be_absent():
    """As in the published pre-trained models: [CLS] itself stands for the pair."""
    config = replace(CONFIG, text=replace(CONFIG.text, pooler=False))
    out = made(config)(**batch())
    np.testing.assert_array_equal(out["pooled_output"], out["sequence_output"][:, 0])


def test_what_cannot_be_built_is_refused():
    with pytest.raises(InputError, match=r"classifier is '3fc'.*Did you mean 2fc"):
        replace(CONFIG, classifier="3fc")
    with pytest.raises(InputError, match=r"text\.types is 2; the third is that of regions"):
        VlBertConfig(VlBertTextConfig(**TEXT, types=2))
