"""The assembled model with regions for pictures, and with a decoder."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.errors import InputError
from mmjax.models import (
    BertConfig,
    FusionConfig,
    VisionLanguageConfig,
    VisionLanguageModel,
    ViTConfig,
)
from mmjax.models.region_encoder import RegionConfig
from tests.models import reference

LAYERS = {"heads": 2, "mlp_width": 20, "depth": 1}
TEXT = BertConfig(**LAYERS, width=16, vocabulary_size=20, max_length=8)
FUSION = FusionConfig(**LAYERS, width=16, project=True)
VILBERT = VisionLanguageConfig(
    image=RegionConfig(width=12, heads=2, region_width=6),
    text=TEXT,
    fusion=replace(FUSION, norm="post"),
    region_classes=5,
    region_features=True,
    decoder_depth=2,
    answers=("a", "b"),
)


def model_of(config):
    return nnx.merge(*reference.split(lambda: VisionLanguageModel(config, nnx.Rngs(0))))


def inputs():
    rng = np.random.default_rng(0)
    return {
        "regions": jnp.array(rng.normal(size=(3, 5, 6)), jnp.float32),
        "boxes": jnp.array(rng.random((3, 5, 4)), jnp.float32),
        "region_mask": jnp.array(np.arange(5) < np.array([[5], [3], [4]])),
        "text": jnp.array(rng.integers(0, 20, (3, 6))),
        "text_mask": jnp.array(np.arange(6) < np.array([[6], [3], [4]])),
    }


@pytest.mark.parametrize("kind", ["none", "merged", "co_attention", "cross_attention"])
def test_every_fusion_takes_regions_and_feeds_a_decoder(kind):
    config = replace(VILBERT, fusion=replace(VILBERT.fusion, kind=kind))
    model, batch = model_of(config), inputs()
    out = model(**batch)
    assert out["region_logits"].shape == (3, 5, 5)
    assert out["region_features"].shape == (3, 5, 6)
    image = model.encode_image(**{k: batch[k] for k in ("regions", "boxes", "region_mask")})
    text = model.encode_text(batch["text"], batch["text_mask"])
    fused = model.fuse(image, text)
    for context in (model.caption_context(image), model.answer_context(image, fused, text)):
        logits = model.decode(context, batch["text"], batch["text_mask"])
        assert logits.shape == (3, 6, 20)
        # A word sees those before it alone.
        changed = model.decode(context, batch["text"].at[:, 3].add(1) % 20, batch["text_mask"])
        np.testing.assert_array_equal(logits[:, :3], changed[:, :3])


def test_says_what_is_missing():
    with pytest.raises(InputError, match=r"set model\.image\.kind to 'region_encoder'"):
        replace(VILBERT, image=ViTConfig(**LAYERS, width=12, image_size=16, patch_size=8))
    model, text = model_of(replace(VILBERT, decoder_depth=0)), inputs()["text"]
    with pytest.raises(InputError, match="no decoder"):
        model.decode(model.encode_text(text), text)
