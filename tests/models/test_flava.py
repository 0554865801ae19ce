"""FLAVA: each modality alone, both together, and patches that are hidden."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.errors import InputError
from mmjax.layers import LayerConfig
from mmjax.models.bert import BertConfig
from mmjax.models.flava import Flava, FlavaConfig
from mmjax.models.vit import ViTConfig
from tests.models import reference

LAYERS = {"width": 12, "depth": 2, "heads": 3, "mlp_width": 20}
SMALL = FlavaConfig(
    image=ViTConfig(**LAYERS, image_size=(16, 24), patch_size=8, pooler=True),
    text=BertConfig(**LAYERS, vocabulary_size=30, max_length=9, norm="pre", pooler=True),
    fusion=LayerConfig(**LAYERS),
    embedding_width=5,
)
WITH_HEADS = replace(SMALL, pretraining=True, codes=7)


@cache
def model(config=SMALL):
    graph, params = reference.split(lambda: Flava(config, nnx.Rngs(0)))
    return nnx.merge(graph, params)


def texts(batch=2, length=6):
    text = np.random.default_rng(0).integers(4, 30, (batch, length))
    mask = np.arange(length) < np.array([[length], [length - 2]])[:batch]
    return {"text": text, "text_mask": mask}


def pictures(batch=2):
    return {"image": np.random.default_rng(1).normal(size=(batch, 16, 24, 3)).astype(np.float32)}


def test_a_modality_alone_is_as_in_a_pair():
    pairs = model(WITH_HEADS)(**pictures(), **texts())
    for inputs, name in ((pictures(), "image"), (texts(), "text")):
        alone = model(WITH_HEADS)(**inputs)
        for key in (f"{name}_embeddings", f"{name}_embeds"):
            np.testing.assert_allclose(alone[key], pairs[key], atol=1e-6)
        assert not any(key.startswith("multimodal") for key in alone)


def test_heads_are_of_pairs_or_of_one_modality():
    def logits(**inputs):
        out = model(WITH_HEADS)(**inputs)
        return {name: array.shape for name, array in out.items() if "logits" in name}

    assert logits(**pictures()) == {"mim_logits": (2, 7, 7)}
    assert logits(**texts()) == {"mlm_logits": (2, 6, 30)}
    assert logits(**pictures(), **texts()) == {
        "contrastive_logits_per_image": (2, 2),
        "contrastive_logits_per_text": (2, 2),
        "itm_logits": (2, 2),
        "mmm_image_logits": (2, 6, 7),
        "mmm_text_logits": (2, 6, 30),
    }


def test_the_fusion_takes_states_before_their_norm():
    """What it takes cannot be had from what the encoders put out."""
    image = model().encode_image(jnp.array(pictures()["image"]))
    normalised = model().image.norm(image.states)
    np.testing.assert_allclose(image.tokens, normalised, atol=1e-6)
    text = model().encode_text(*map(jnp.asarray, texts().values()))
    fused = model().fuse(image, text)
    other = model().fuse(replace(image, states=image.tokens), text)
    assert np.abs(fused.pooled - other.pooled).max() > 1e-3
    same = model().fuse(replace(image, tokens=image.states), text)
    np.testing.assert_array_equal(fused.pooled, same.pooled)


def test_padding_changes_nothing():
    short = texts(batch=1, length=4)
    alone = model()(**pictures(1), **short)
    text, mask = np.full((1, 7), 9), np.zeros((1, 7), bool)
    text[:, :4], mask[:, :4] = short["text"], True
    padded = model()(**pictures(1), text=text, text_mask=mask)
    for name in ("text_embeddings", "multimodal_embeddings"):
        length = alone[name].shape[1]
        np.testing.assert_allclose(padded[name][:, :length], alone[name], atol=2e-6)


def test_hidden_patches_cannot_be_seen():
    mask = np.zeros((2, 6), bool)
    mask[0, 4] = True  # the middle one of the lower three
    image = pictures()["image"]
    other = image.copy()
    other[0, 8:, 8:16] += 1
    seen, changed, hidden, same = (
        model()(image=x, **given)["image_embeddings"]
        for given in ({}, {"patch_mask": mask})
        for x in (image, other)
    )
    assert np.abs(seen[0] - changed[0]).max() > 1e-3
    np.testing.assert_allclose(hidden, same, atol=1e-6)
    assert np.abs(seen[0] - hidden[0]).max() > 1e-3
    np.testing.assert_allclose(seen[1], hidden[1], atol=1e-6)


def test_hidden_patches_keep_their_places():
    """One token stands for all of them, but each at its own position."""
    image = jnp.zeros((1, 16, 24, 3))
    where = jnp.ones((1, 6), bool)
    states = model(replace(SMALL, image=replace(SMALL.image, depth=1))).encode_image(image, where)
    distances = np.abs(states.tokens[0, 1:, None] - states.tokens[0, None, 1:]).max(axis=-1)
    assert distances[~np.eye(6, dtype=bool)].min() > 1e-3


def test_without_a_class_token_the_pictures_stands_in_front():
    config = replace(SMALL, class_token=False)
    out = model(config)(**pictures(), **texts())
    assert out["multimodal_embeddings"].shape[1] == 7 + 6
    assert model()(**pictures(), **texts())["multimodal_embeddings"].shape[1] == 1 + 7 + 6


def test_similarities_are_of_pooled_vectors():
    """As the contrastive objective computes them: of what the phases return."""
    out = model()(**pictures(), **texts())
    image = model().encode_image(jnp.array(pictures()["image"]))
    text = model().encode_text(*map(jnp.asarray, texts().values()))
    cosines = model().contrastive.image(image.pooled) @ model().contrastive.text(text.pooled).T
    expected = model().contrastive.scale * cosines
    np.testing.assert_allclose(out["contrastive_logits_per_image"], expected, atol=1e-5)
    np.testing.assert_allclose(out["contrastive_logits_per_text"], expected.T, atol=1e-5)
    taken = image.take(jnp.array([1, 1, 0]))
    np.testing.assert_array_equal(taken.states, image.states[jnp.array([1, 1, 0])])


def test_dropout_follows_the_key():
    parts = {name: replace(getattr(SMALL, name), dropout=0.5) for name in ("image", "text")}
    dropping = model(replace(SMALL, **parts))
    inputs = pictures() | texts()
    evaluated, one, same, other = (
        dropping(**inputs, train=key is not None, key=key)["multimodal_embeddings"]
        for key in (None, *map(jax.random.key, (0, 0, 1)))
    )
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-3
    np.testing.assert_allclose(evaluated, model()(**inputs)["multimodal_embeddings"], atol=1e-6)


def test_patches_are_hidden_by_a_token():
    config = replace(SMALL, mask_token=False)
    with pytest.raises(InputError, match="no mask_token"):
        model(config)(**pictures(), patch_mask=np.ones((2, 6), bool))


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("text", {"norm": "post"}, "text.norm is 'post'"),
        ("fusion", {"norm": "post"}, "fusion.norm is 'post'"),
        ("image", {"pooler": False}, "set image.pooler"),
        ("image", {"pool": "mean"}, "image.pool at 'class_token'"),
    ],
)
def test_other_encoders_are_refused(part, changes, message):
    with pytest.raises(InputError, match=message):
        replace(SMALL, **{part: replace(getattr(SMALL, part), **changes)})
