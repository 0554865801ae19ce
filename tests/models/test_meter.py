"""METER's own parts; tests/weights/test_meter.py holds it against recordings of the original."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.errors import InputError
from mmjax.models.bert import BertConfig
from mmjax.models.fusion import CoAttentionConfig
from mmjax.models.meter import Meter, MeterConfig
from mmjax.models.vit import ViTConfig
from tests.models import reference
from tests.models.reference import assert_dropout_in_every_part, dense, gelu, layer_norm

CONFIG = MeterConfig(
    image=ViTConfig(width=12, depth=1, heads=3, image_size=16, patch_size=8),
    text=BertConfig(
        width=16,
        depth=2,
        heads=2,
        vocabulary_size=20,
        max_length=11,
        first_position=2,
        padding=1,
        types=1,
    ),
    fusion=CoAttentionConfig(
        width=24,
        depth=2,
        heads=4,
        norm="post",
        epsilon=1e-3,
        activation="relu",
        project=True,
        token_types=True,
    ),
    matching=False,
    masked_language=False,
)
HEADS = {
    "itm_logits": ({"matching": True}, (3, 2)),
    "mlm_logits": ({"masked_language": True}, (3, 7, 20)),
    "vqa_logits": ({"answers": ("no", "yes", "two", "red")}, (3, 4)),
    "ve_logits": ({"entailment": True}, (3, 3)),
    "rank_logits": ({"ranking": True}, (3,)),
    "nlvr_logits": ({"reasoning": True}, (3, 2)),
}


def batch(lengths=(7, 4, 5), length=7):
    rng = np.random.default_rng(0)
    text = rng.integers(2, 20, size=(len(lengths), 7))[:, :length]
    mask = np.arange(length) < np.array(lengths)[:, None]
    pictures = rng.normal(size=(2, len(lengths), 16, 16, 3))
    return {
        "image": jnp.array(pictures[0], jnp.float32),
        "image_b": jnp.array(pictures[1], jnp.float32),
        "text": jnp.array(np.where(mask, text, 1)),
        "text_mask": jnp.array(mask),
    }


def one_picture(**options):
    inputs = batch(**options)
    del inputs["image_b"]
    return inputs


def make(config):
    return reference.split(lambda: Meter(config, nnx.Rngs(0)))


def run(config, inputs, key=None):
    graph, params = make(config)
    train = key is not None
    forward = jax.jit(lambda p, i, key: nnx.merge(graph, p)(**i, train=train, key=key))
    with jax.default_matmul_precision("highest"):
        return forward(params, inputs, key)


def test_heads_are_those_that_are_asked_for():
    features = {"sequence_output", "image_output", "pooled_output"}
    for name, (head, shape) in HEADS.items():
        config = replace(CONFIG, **head)
        graph, params = make(config)
        inputs = batch() if config.reasoning else one_picture()
        out = jax.eval_shape(lambda p, i, graph=graph: nnx.merge(graph, p)(**i), params, inputs)
        assert out.keys() == features | {name}
        assert (out[name].shape, out[name].dtype) == (shape, jnp.float32)


def test_the_language_head_has_the_norm_and_activation_of_the_fusion():
    config = replace(CONFIG, masked_language=True)
    out = run(config, one_picture())
    p = reference.in_float64(make(config)[1])["masked_language"]
    hidden = np.maximum(dense(np.asarray(out["sequence_output"], np.float64), p["transform"]), 0)
    hidden = layer_norm(hidden, p["norm"], 1e-3)
    expected = hidden @ p["decoder"]["embedding"].T + p["bias"]
    np.testing.assert_allclose(out["mlm_logits"], expected, atol=2e-5)


@partial(jax.jit, static_argnums=0)
def both_pictures(graph, params, inputs):
    """The fused vectors of a text with either picture."""
    model = nnx.merge(graph, params)
    text = model.encode_text(inputs["text"], inputs["text_mask"])
    images = [model.encode_image(inputs[name]) for name in ("image", "image_b")]
    return [model.fuse(image, text, picture=i).pooled for i, image in enumerate(images)]


def test_two_pictures_are_two_passes_and_one_classifier():
    config = replace(CONFIG, reasoning=True)
    out = run(config, batch())
    graph, params = make(config)
    first, second = both_pictures(graph, params, batch())
    np.testing.assert_allclose(out["pooled_output"], first, atol=1e-5)
    p = reference.in_float64(params)["reasoning"]
    both = np.concatenate([first, second], axis=-1).astype(np.float64)
    hidden = gelu(layer_norm(dense(both, p["hidden"]), p["norm"], 1e-5))
    np.testing.assert_allclose(out["nlvr_logits"], dense(hidden, p["classifier"]), atol=2e-5)


def test_a_second_picture_is_marked_as_such():
    config = replace(CONFIG, reasoning=True)
    graph, params = make(config)
    inputs = one_picture()
    twice = inputs | {"image_b": inputs["image"]}
    first, second = both_pictures(graph, params, twice)
    assert np.abs(first - second).max() > 0.01
    table = params["fusion"]["type_embedding"]["embedding"]
    params["fusion"]["type_embedding"]["embedding"] = table.at[2].set(table[1])
    first, second = both_pictures(graph, params, twice)
    np.testing.assert_allclose(second, first, atol=1e-6)


def test_a_second_picture_needs_its_head():
    with pytest.raises(InputError, match=r"image_b .* no head"):
        run(CONFIG, batch())


def test_padding_changes_nothing():
    short, padded = one_picture(lengths=(5, 4, 5), length=5), one_picture(lengths=(5, 4, 5))
    expected, found = run(CONFIG, short), run(CONFIG, padded)
    np.testing.assert_allclose(found["pooled_output"], expected["pooled_output"], atol=1e-5)
    np.testing.assert_allclose(found["image_output"], expected["image_output"], atol=1e-5)


def test_dropout_is_drawn_by_the_key_in_every_part():
    parts = ("image", "text", "fusion")
    dropping = {name: replace(getattr(CONFIG, name), dropout=0.5) for name in parts}
    graph, params = make(replace(CONFIG, **dropping))
    assert_dropout_in_every_part(graph, params, one_picture(), "pooled_output")
