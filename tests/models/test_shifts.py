"""What an adversary adds to embedded words and patches, and to regions, in every family."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.errors import InputError
from mmjax.models import VisionLanguageModel
from mmjax.models.bert import BertConfig
from mmjax.models.bridgetower import BridgeTower
from mmjax.models.encoders import ImageModel, ImageModelConfig
from mmjax.models.flava import Flava
from mmjax.models.lxmert import Lxmert
from mmjax.models.meter import Meter
from mmjax.models.resnet import ResNetConfig
from mmjax.models.text_tower import TextTowerConfig
from mmjax.models.two_tower import TwoTower, TwoTowerConfig
from mmjax.models.vilt import Vilt
from mmjax.models.vit import ViTConfig
from tests.models import (
    reference,
    test_bridgetower,
    test_flava,
    test_lxmert,
    test_meter,
    test_regions,
    test_vilt,
)

LAYERS = {"width": 12, "depth": 2, "heads": 3, "mlp_width": 20}
IMAGE = ViTConfig(**LAYERS, image_size=16, patch_size=8)
CLIP = TwoTowerConfig(IMAGE, TextTowerConfig(**LAYERS, vocabulary_size=20, end_token=3))
ALIGN = TwoTowerConfig(IMAGE, BertConfig(**LAYERS, vocabulary_size=20))
TINY = reference.tiny_model()


def region_case(name):
    model, config = test_regions.FAMILIES[name]
    return model, config, test_regions.batch()


def vilt_case():
    return Vilt, test_vilt.SMALL, test_vilt.texts() | {"image": test_vilt.pictures(2, 24, 24)}


# A model, its config, a batch; the shapes of what can be shifted.
CASES = {
    "vision_language": (
        (VisionLanguageModel, TINY, reference.tiny_batch(TINY, 4)),
        {"text": (4, 11, 32), "image": (4, 10, 32)},
    ),
    "clip": ((TwoTower, CLIP, test_meter.one_picture()), {"text": (3, 7, 12), "image": (3, 5, 12)}),
    "align": (
        (TwoTower, ALIGN, test_meter.one_picture()),
        {"text": (3, 7, 12), "image": (3, 5, 12)},
    ),
    "meter": (
        (Meter, test_meter.CONFIG, test_meter.one_picture()),
        {"text": (3, 7, 16), "image": (3, 5, 12)},
    ),
    "bridgetower": (
        (BridgeTower, test_bridgetower.CONFIG, test_bridgetower.batch()),
        {"text": (3, 7, 16), "image": (3, 5, 12)},
    ),
    "vilt": (vilt_case(), {"text": (2, 6, 12), "image": (2, 10, 12)}),
    "flava": (
        (Flava, test_flava.SMALL, test_flava.texts() | test_flava.pictures()),
        {"text": (2, 6, 12), "image": (2, 7, 12)},
    ),
    "lxmert": (
        (Lxmert, test_lxmert.CONFIG, test_lxmert.batch()),
        {"text": (2, 6, 12), "image": (2, 5, 6)},
    ),
    "uniter": (region_case("uniter"), {"text": (3, 7, 24), "image": (3, 5, 6)}),
    "oscar": (region_case("oscar"), {"text": (3, 7, 24)}),
    "vl_bert": (region_case("vl_bert"), {"text": (3, 7, 24)}),
}
SIDES = [(name, side) for name, (_, shapes) in CASES.items() for side in shapes]


@cache
def built(name):
    (model, config, batch), shapes = CASES[name]
    model = nnx.merge(*reference.split(lambda: model(config, nnx.Rngs(0))))
    return model, {key: jnp.array(array) for key, array in batch.items()}, shapes


def encode(model, batch, side, **shift):
    """One modality as the fusion gets it."""
    fields = {
        "text": ("text", "text_mask"),
        "image": ("image", "regions", "boxes", "region_mask"),
    }
    inputs = {name: batch[name] for name in fields[side] if name in batch}
    return getattr(model, f"encode_{side}")(**inputs, **shift)


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_a_shift_enters_where_the_gradient_says(name, side):
    """No shift, no change; a small one changes the features as its gradient foretells."""
    model, batch, shapes = built(name)
    plain = encode(model, batch, side)
    zero = jnp.zeros(shapes[side])
    same = encode(model, batch, side, **{f"{side}_shift": zero})
    for found, expected in zip(jax.tree.leaves(same), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(found, expected)
    weights = np.random.default_rng(0).normal(size=plain.tokens.shape).astype(np.float32)
    if plain.mask is not None:
        weights = weights * np.asarray(plain.mask)[..., None]

    def score(shift):
        tokens = encode(model, batch, side, **{f"{side}_shift": shift}).tokens
        return (weights * tokens).sum()

    slope = jax.jit(jax.grad(score))(zero)
    length = jnp.linalg.norm(slope)
    step = 2e-3 * slope / length
    with jax.default_matmul_precision("highest"):
        rise = (score(step) - score(-step)) / 4e-3
    np.testing.assert_allclose(rise, length, rtol=2e-2)
    # Every token has a say, and none of the padding.
    touched = np.abs(slope).max(axis=-1) > 0
    assert (touched == (True if plain.mask is None else np.asarray(plain.mask))).all()


def test_a_shift_keeps_the_type_that_the_model_computes_in():
    config = replace(TINY, text=replace(TINY.text, dtype="bfloat16"))
    model = nnx.merge(*reference.split(lambda: VisionLanguageModel(config, nnx.Rngs(0))))
    batch = {name: jnp.array(array) for name, array in reference.tiny_batch(TINY, 4).items()}
    shifted = encode(model, batch, "text", text_shift=jnp.ones((4, 11, 32)))
    assert shifted.tokens.dtype == encode(model, batch, "text").tokens.dtype == jnp.bfloat16


def test_an_encoder_without_patches_is_refused():
    layers = ResNetConfig(stem_width=4, widths=(8,), depths=(1,), layer="basic")
    model = ImageModel(ImageModelConfig(layers), nnx.Rngs(0))
    with pytest.raises(InputError, match=r"patches of a ViT.* by a ResNet"):
        model.encode_image(jnp.zeros((2, 32, 32, 3)), image_shift=jnp.zeros((2, 3, 4)))
