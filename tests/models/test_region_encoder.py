"""The encoder of regions beside numpy, and in models whose pictures are regions."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.errors import InputError
from mmjax.models import BertConfig, FusionConfig, ViTConfig
from mmjax.models.region_encoder import RegionConfig, RegionEncoder
from mmjax.models.two_tower import TwoTower, TwoTowerConfig
from mmjax.models.vision_language import VisionLanguageConfig, VisionLanguageModel
from tests.models import reference

FEATURES = 6
LAYERS = {"width": 16, "heads": 2, "mlp_width": 20}
EMBEDDED = RegionConfig(**LAYERS, region_width=FEATURES)
POST = replace(EMBEDDED, depth=2, epsilon=1e-3)
PRE = replace(EMBEDDED, depth=1, norm="pre", heads=4)
TEXT = BertConfig(**LAYERS, depth=1, vocabulary_size=20, max_length=8)
VIT = ViTConfig(**LAYERS, depth=1, image_size=16, patch_size=8)


@cache
def parts(config):
    return reference.split(lambda: RegionEncoder(config, nnx.Rngs(0)))


def batch(rows=3, count=5, seed=0):
    """Regions, some of them padding, some of them hidden."""
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.random((rows, count, 2, 2)), axis=2)
    mask = np.arange(count) < (count - np.arange(rows))[:, None]
    return {
        "regions": jnp.array(rng.normal(size=(rows, count, FEATURES)), jnp.float32),
        "boxes": jnp.array(corners.reshape(rows, count, 4), jnp.float32),
        "region_mask": jnp.array(mask),
        "region_masked": jnp.array(mask & (rng.random((rows, count)) < 0.3)),
    }


def in_numpy(params, config, regions, boxes, region_mask, region_masked):
    """Lu et al. 2019, section 3.1, an example at a time and without padding: tokens and mean."""
    p, found = reference.in_float64(params), []
    for row, there in enumerate(region_mask):
        places = []
        for left, top, right, bottom in np.asarray(boxes[row], np.float64)[there]:
            places.append([left, top, right, bottom, (right - left) * (bottom - top)])
        features = np.asarray(regions[row], np.float64)[there]
        features[region_masked[row][there]] = 0
        x = reference.dense(features, p["features"]) + reference.dense(np.array(places), p["box"])
        x = reference.layer_norm(x, p["embedding_norm"], config.epsilon)[None]
        for layer in reference.layers_of(p["blocks"], config.depth) if config.depth else ():
            x = reference.attention_sublayer(x, None, layer["self_attention"], None, config)
            x = reference.mlp_sublayer(x, layer["mlp"], config)
        if "norm" in p:
            x = reference.layer_norm(x, p["norm"], config.epsilon)
        found.append((x[0], x[0].mean(axis=0)))
    return found


@pytest.mark.parametrize("config", [EMBEDDED, POST, PRE], ids=["embedded", "post", "pre"])
def test_agrees_with_numpy(config):
    """The other side knows no padding."""
    inputs, (graph, params) = batch(), parts(config)
    encoded = nnx.merge(graph, params)(**inputs)
    expected = in_numpy(params, config, **{k: np.asarray(v) for k, v in inputs.items()})
    for row, (tokens, pooled) in enumerate(expected):
        np.testing.assert_allclose(encoded.tokens[row, : len(tokens)], tokens, atol=2e-5)
        np.testing.assert_allclose(encoded.pooled[row], pooled, atol=2e-5)
    np.testing.assert_array_equal(encoded.mask, inputs["region_mask"])


def test_without_masks_all_regions_are_there_and_shown():
    encoder, inputs = nnx.merge(*parts(POST)), batch()
    everything = jnp.ones((3, 5), bool)
    found = encoder(inputs["regions"], inputs["boxes"])
    expected = encoder(inputs["regions"], inputs["boxes"], everything, ~everything)
    assert found.mask is None
    np.testing.assert_allclose(found.tokens, expected.tokens, atol=1e-6)
    np.testing.assert_allclose(found.pooled, expected.pooled, atol=1e-6)


def test_a_picture_without_regions_is_finite():
    encoder, inputs = nnx.merge(*parts(POST)), batch()
    inputs["region_mask"] = inputs["region_mask"].at[1].set(False)
    encoded = encoder(**inputs)
    assert np.isfinite(encoded.tokens).all()
    np.testing.assert_array_equal(encoded.pooled[1], 0)


def test_a_shift_is_added_to_features_hidden_ones_too():
    encoder, inputs = nnx.merge(*parts(EMBEDDED)), batch()
    shift = jnp.array(np.random.default_rng(1).normal(size=(3, 5, FEATURES)), jnp.float32)
    hidden = inputs["region_masked"][..., None]
    by_hand = jnp.where(hidden, 0, inputs["regions"]) + shift
    found = encoder(**inputs, shift=shift)
    expected = encoder(by_hand, inputs["boxes"], inputs["region_mask"])
    np.testing.assert_allclose(found.tokens, expected.tokens, atol=1e-6)


def test_dropout_is_drawn_from_the_key():
    encoder, inputs = nnx.merge(*parts(replace(POST, dropout=0.5))), batch()
    once, again, other = (encoder(**inputs, key=jax.random.key(n)).pooled for n in (0, 0, 1))
    np.testing.assert_array_equal(once, again)
    assert np.abs(once - other).max() > 0.01


# ---- as the pictures of a model


def two_tower(image):
    return nnx.merge(*reference.split(lambda: TwoTower(TwoTowerConfig(image, TEXT), nnx.Rngs(0))))


def test_two_towers_take_regions():
    model, inputs = two_tower(POST), batch()
    inputs.pop("region_masked")
    out = model(text=np.full((3, 4), 5), **inputs)
    pooled = model.image(**inputs).pooled
    np.testing.assert_allclose(out["image_embeds"], model.contrastive.image(pooled), atol=1e-6)
    assert out["logits_per_image"].shape == (3, 3)


def test_an_encoder_gets_what_it_takes():
    """Of a batch with pixels and regions."""
    regions, image = batch(), jnp.full((3, 16, 16, 3), 7, jnp.uint8)
    of_regions, of_pixels = two_tower(POST), two_tower(VIT)
    found = of_regions.encode_image(image=image, **regions).pooled
    np.testing.assert_array_equal(found, of_regions.image(**regions).pooled)
    found = of_pixels.encode_image(image=image, **regions).pooled
    np.testing.assert_array_equal(found, of_pixels.image(image).pooled)
    with pytest.raises(InputError, match="TwoTower needs the input 'boxes'"):
        of_regions.encode_image(image=image, regions=regions["regions"])
    with pytest.raises(InputError, match="TwoTower needs the input 'image'"):
        of_pixels.encode_image(**regions)


@pytest.mark.parametrize("kind", ["merged", "co_attention", "cross_attention"])
def test_padding_is_seen_by_no_fusion(kind):
    config = VisionLanguageConfig(
        image=POST, text=TEXT, fusion=FusionConfig(**LAYERS, depth=1, kind=kind)
    )
    graph, params = reference.split(lambda: VisionLanguageModel(config, nnx.Rngs(0)))
    inputs, text = batch(), jnp.full((3, 4), 5)

    @jax.jit
    def pooled(params, inputs):
        model = nnx.merge(graph, params)
        return model.fuse(model.encode_image(**inputs), model.encode_text(text)).pooled

    found, there = pooled(params, inputs), inputs["region_mask"][..., None]
    padding = {name: jnp.where(there, inputs[name], 0.5) for name in ("regions", "boxes")}
    np.testing.assert_allclose(pooled(params, inputs | padding), found, atol=1e-6)
    two = {name: value[2:, :3] for name, value in inputs.items()}
    model = nnx.merge(graph, params)
    alone = model.fuse(model.encode_image(**two), model.encode_text(text[2:])).pooled
    np.testing.assert_allclose(alone, found[2:], atol=1e-5)


def test_what_cannot_be_built_or_read_is_refused():
    with pytest.raises(InputError, match="depth -1"):
        replace(POST, depth=-1)
    with pytest.raises(InputError, match="depth 0"):
        replace(TEXT, depth=0)
    with pytest.raises(InputError, match=r"takes \[batch, regions, 6\]"):
        nnx.merge(*parts(POST))(**batch() | {"regions": jnp.zeros((3, 5, 7))})
