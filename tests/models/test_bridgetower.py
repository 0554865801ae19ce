"""BridgeTower beside a reference in plain numpy; tests/parity holds it against `transformers`."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.errors import InputError
from mmjax.models.bert import BertConfig
from mmjax.models.bridgetower import BridgeTower, BridgeTowerConfig
from mmjax.models.fusion import CoAttentionConfig
from mmjax.models.vit import ViTConfig
from tests.models import reference
from tests.models.reference import assert_dropout_in_every_part, dense, gelu, layer_norm

CONFIG = BridgeTowerConfig(
    image=ViTConfig(width=12, depth=4, heads=3, image_size=16, patch_size=8, epsilon=1e-5),
    text=BertConfig(width=16, depth=4, heads=2, vocabulary_size=20, max_length=9, epsilon=1e-6),
    fusion=CoAttentionConfig(width=20, depth=3, heads=4, mlp_width=28, norm="post", epsilon=1e-4),
    epsilon=1e-3,
)
HEADS = {"matching": True, "masked_language": True, "embedding_width": 6}


def batch(lengths=(7, 4, 5), length=7):
    rng = np.random.default_rng(0)
    text = rng.integers(1, 20, size=(len(lengths), 7))[:, :length]
    image = rng.normal(size=(len(lengths), 16, 16, 3))
    mask = np.arange(length) < np.array(lengths)[:, None]
    return {
        "image": jnp.array(image, jnp.float32),
        "text": jnp.array(text),
        "text_mask": jnp.array(mask),
    }


def make(config):
    return reference.split(lambda: BridgeTower(config, nnx.Rngs(0)))


def run(config, inputs, key=None):
    graph, params = make(config)
    train = key is not None
    forward = jax.jit(lambda p, i, key: nnx.merge(graph, p)(**i, train=train, key=key))
    with jax.default_matmul_precision("highest"):
        return forward(params, inputs, key)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def fused(p, images, texts, mask, config):
    """The paper's section 3.2: a layer takes the sum of what is fused and of the next layers."""
    fusion, epsilon = config.fusion, config.epsilon
    poolers = {name: p[name] for name in ("image_pooler", "text_pooler")}
    norms = [(p["image_norm"], p["text_norm"])]
    layers = [p["first"]]
    for layer in reference.layers_of(p["rest"], fusion.depth - 1):
        norms.append((layer["image_bridge"], layer["text_bridge"]))
        layers.append(layer["fusion"])
    image, text, pooled = 0.0, 0.0, None
    for layer, (image_norm, text_norm), new_image, new_text in zip(
        layers, norms, images, texts, strict=True
    ):
        image = layer_norm(image + new_image, image_norm, epsilon)
        text = layer_norm(text + new_text, text_norm, epsilon)
        one = {"blocks": {"layers": jax.tree.map(lambda x: x[None], layer)}, **poolers}
        image, text, pooled = reference.co_attention(
            one, image, text, mask, replace(fusion, depth=1)
        )
    return image, text, pooled


def test_agrees_with_the_paper():
    config = replace(CONFIG, **HEADS)
    inputs = batch()
    out = run(config, inputs)
    p = reference.in_float64(make(config)[1])
    fusion, types = p["fusion"], p["fusion"]["type_embedding"]["embedding"]
    text, mask = (np.asarray(inputs[name]) for name in ("text", "text_mask"))

    depths = range(2, 5)  # the last three of four layers
    image_layers = [
        reference.vit(p["image"], inputs["image"], replace(config.image, depth=depth))[0]
        for depth in depths
    ]
    text_layers = [
        reference.bert(p["text"], text, mask, replace(config.text, depth=depth))[0]
        for depth in depths
    ]
    images = [dense(x, fusion["image_projection"]) + types[1] for x in image_layers]
    texts = [dense(x, fusion["text_projection"]) + types[0] for x in text_layers]
    image, words, pooled = fused(fusion, images, texts, mask, config)

    head = p["masked_language"]
    hidden = layer_norm(gelu(dense(words, head["transform"])), head["norm"], config.epsilon)
    contrastive = p["contrastive"]
    image_embeds = unit(dense(images[-1][:, 0], contrastive["image_projection"]))
    text_embeds = unit(dense(text_layers[-1][:, 0], contrastive["text_projection"]))
    expected = {
        "image_features": image,
        "text_features": words,
        "pooler_output": pooled,
        "itm_logits": dense(pooled, p["matching"]["classifier"]),
        "mlm_logits": hidden @ head["decoder"]["embedding"].T + head["bias"],
        "image_embeds": image_embeds,
        "text_embeds": text_embeds,
        "cross_embeds": unit(dense(pooled, p["pair_projection"])),
        "logits_per_image": np.exp(contrastive["logit_scale"]) * image_embeds @ text_embeds.T,
    }
    assert out.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(out[name], value, atol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    ("head", "shape"),
    [({"matching": True}, (3, 2)), ({"masked_language": True}, (3, 7, 20)), ({}, None)],
    ids=str,
)
def test_one_head_gives_the_logits(head, shape):
    out = run(replace(CONFIG, **head), batch())
    assert out["logits"].shape == shape if shape else "logits" not in out


def test_contrastive_logits_are_the_three_vectors():
    out = run(replace(CONFIG, embedding_width=6), batch())
    for i, name in enumerate(("text_embeds", "image_embeds", "cross_embeds")):
        np.testing.assert_array_equal(out["logits"][:, i], out[name])


def test_padding_changes_nothing():
    short, padded = batch((5, 4, 5), length=5), batch((5, 4, 5))
    expected, found = run(CONFIG, short), run(CONFIG, padded)
    np.testing.assert_allclose(found["pooler_output"], expected["pooler_output"], atol=1e-5)
    np.testing.assert_allclose(found["image_features"], expected["image_features"], atol=1e-5)


def test_pairs_may_be_put_together_anew():
    """Negatives of the matching objective are other rows of what is encoded already."""
    graph, params = make(CONFIG)
    inputs, rows = batch(), jnp.array([1, 2, 0])

    @jax.jit
    def fuse_anew(params):
        model = nnx.merge(graph, params)
        image = model.encode_image(inputs["image"])
        text = model.encode_text(inputs["text"], inputs["text_mask"])
        return model.fuse(image.take(rows), text).pooled

    expected = run(CONFIG, inputs | {"image": inputs["image"][rows]})
    np.testing.assert_allclose(fuse_anew(params), expected["pooler_output"], atol=1e-5)


def test_how_it_computes_changes_nothing():
    plain = run(CONFIG, batch())
    parts = ("image", "text", "fusion")
    changed = {
        name: replace(getattr(CONFIG, name), remat="full", unroll=True, attention="einsum")
        for name in parts
    }
    found = run(replace(CONFIG, **changed), batch())
    for name, value in plain.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5, err_msg=name)


def test_dropout_is_drawn_by_the_key_in_every_part():
    parts = ("image", "text", "fusion")
    dropping = {name: replace(getattr(CONFIG, name), dropout=0.5) for name in parts}
    graph, params = make(replace(CONFIG, **dropping))
    assert_dropout_in_every_part(graph, params, batch(), "pooler_output")


@pytest.mark.parametrize(
    ("part", "depth", "words"),
    [("image", 3, ["3 (image)", "4 (text)"]), ("fusion", 1, ["1 layers"]), ("fusion", 5, ["5"])],
)
def test_depths_that_do_not_meet_are_refused(part, depth, words):
    with pytest.raises(InputError) as error:
        replace(CONFIG, **{part: replace(getattr(CONFIG, part), depth=depth)})
    assert all(word in str(error.value) for word in words), str(error.value)
