"""ALBEF's parts: what sees what, what is shared, and which answer wins."""

import itertools
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.errors import InputError
from mmjax.models.albef import Albef, AlbefConfig
from mmjax.models.bert import BertConfig
from mmjax.models.vit import ViTConfig
from mmjax.rules import by_path
from tests.models import reference

LAYERS = {"width": 16, "heads": 2, "mlp_width": 20}
PLAIN = AlbefConfig(
    image=ViTConfig(**LAYERS, depth=1, image_size=16, patch_size=8),
    text=BertConfig(**LAYERS, depth=3, vocabulary_size=20, max_length=8),
    fusion_layer=2,
    embedding_width=6,
    matching=True,
    masked_language=True,
)
TWO = replace(PLAIN, pictures=2, labels=("no", "yes"))
ANSWERING = replace(PLAIN, decoder_depth=2)
HEADS = {"image_embeds", "text_embeds", "logits_per_image", "itm_logits", "mlm_logits"}


@cache
def model_of(config):
    return nnx.merge(*reference.split(lambda: Albef(config, nnx.Rngs(0))))


def batch(rows=2, length=7, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": jnp.array(rng.normal(size=(rows, 16, 16, 3)), jnp.float32),
        "text": jnp.array(rng.integers(1, 20, size=(rows, length))),
        "text_mask": jnp.array(np.arange(length) < length - np.arange(rows)[:, None]),
    }


def test_only_the_upper_layers_see_the_picture():
    model, inputs = model_of(PLAIN), batch()
    out, other = (
        model(**inputs | {"image": image}) for image in (inputs["image"], batch(seed=1)["image"])
    )
    assert out.keys() == HEADS | {"sequence_output", "pooled_output"}
    np.testing.assert_array_equal(out["text_embeds"], other["text_embeds"])
    for name in ("image_embeds", "sequence_output", "mlm_logits", "itm_logits"):
        assert np.abs(out[name] - other[name]).max() > 1e-3, name


def test_padding_changes_nothing():
    model, inputs = model_of(ANSWERING), batch()
    answers = {"decoder_text": inputs["text"][:, :4], "decoder_mask": inputs["text_mask"][:, 3:]}
    padded = {**inputs, **answers}
    out = model(**padded)
    for name in ("text", "decoder_text"):
        mask = padded[name.replace("text", "mask") if "_" in name else "text_mask"]
        padded[name] = jnp.where(mask, padded[name], 0)
    other = model(**padded)
    for name in ("pooled_output", "text_embeds", "itm_logits"):
        np.testing.assert_allclose(out[name], other[name], atol=1e-5, err_msg=name)
    kept = np.asarray(answers["decoder_mask"])
    np.testing.assert_allclose(out["logits"][kept], other["logits"][kept], atol=1e-5)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_the_layers_do_as_the_paper_says(norm):
    """Self-attention, cross-attention to the picture, MLP."""
    config = replace(PLAIN, text=replace(PLAIN.text, norm=norm))
    model, inputs = model_of(config), batch()
    seen = model.encode_image(inputs["image"])
    read = model.encode_text(inputs["text"], inputs["text_mask"])
    fused = model.fuse(seen, read)
    params = nnx.to_pure_dict(nnx.state(model.fusion))
    layer = reference.layers_of(reference.in_float64(params["blocks"]), 1)[0]
    x, image = (np.asarray(encoded.tokens, np.float64) for encoded in (read, seen))
    mask, cross = np.asarray(inputs["text_mask"]), layer["cross_attention"]
    x = reference.attention_sublayer(x, None, layer["self_attention"], mask, config.text)
    if norm == "post":
        x = reference.attention_sublayer(x, image, cross, None, config.text)
    else:
        normed = reference.layer_norm(x, cross["norm"], config.text.epsilon)
        x = x + reference.multi_head(normed, image, cross["attention"], None)
    x = reference.mlp_sublayer(x, layer["mlp"], config.text)
    if norm == "pre":
        x = reference.layer_norm(x, params["norm"], config.text.epsilon)
    np.testing.assert_allclose(fused.text_tokens, x, atol=1e-5)
    np.testing.assert_array_equal(fused.pooled, fused.text_tokens[:, 0])


def test_two_pictures_are_seen_in_turn():
    model, inputs = model_of(TWO), batch()
    images = {"image": inputs["image"], "image_b": batch(seed=1)["image"]}
    out = model(**inputs | images)
    swapped = model(**inputs | dict(zip(images, reversed(images.values()), strict=True)))
    assert "ve_logits" not in out
    assert out["nlvr_logits"].shape == (2, 2)
    assert np.abs(out["nlvr_logits"] - swapped["nlvr_logits"]).max() > 1e-3
    shapes = {
        path: leaf.shape for path, leaf in by_path(nnx.to_pure_dict(nnx.state(model))).items()
    }
    blocks = "fusion/blocks/layers"
    for part in ("query", "key", "value", "out"):
        kernel = f"cross_attention/attention/{part}/kernel"
        assert f"{blocks}/first/{kernel}" in shapes
        assert (f"{blocks}/second/{kernel}" in shapes) == (part in ("query", "out"))


def test_shared_keys_have_one_gradient():
    """That of the sum over both layers: a step along it is a step of both."""
    model, inputs = model_of(TWO), batch()
    graph, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    inputs["image_b"] = batch(seed=1)["image"]

    def loss(params):
        return nnx.merge(graph, params)(**inputs)["nlvr_logits"][:, 1].sum()

    loss = jax.jit(loss)
    gradient = jax.jit(jax.grad(loss))(params)
    path = ("fusion", "blocks", "layers", "first", "cross_attention", "attention", "value")
    direction = jax.tree.map(jnp.zeros_like, params)
    here, there = direction, gradient
    for name in path:
        here, there = here[name], there[name]
    here["kernel"] = there["kernel"]

    def along(step):
        return loss(jax.tree.map(lambda x, d: x + step * d, params, direction))

    slope = (along(1e-2) - along(-1e-2)) / 2e-2
    np.testing.assert_allclose(slope, jnp.vdot(there["kernel"], there["kernel"]), rtol=1e-2)


def test_an_answer_is_written_from_left_to_right():
    model, inputs = model_of(ANSWERING), batch()
    answer = jnp.array([[1, 5, 6, 7], [1, 8, 9, 2]])
    logits = model(**inputs, decoder_text=answer)["logits"]
    changed = model(**inputs, decoder_text=answer.at[:, 2].set(11))["logits"]
    np.testing.assert_array_equal(logits[:, :2], changed[:, :2])
    assert np.abs(logits[:, 2:] - changed[:, 2:]).max(axis=(0, 2)).min() > 1e-3


def test_the_best_answer_is_found():
    """Each answer scored alone, in a loop: log p of its words, its first word's twice."""
    model, inputs = model_of(ANSWERING), batch(rows=3)
    answers = np.array([[1, *words] for words in itertools.permutations((5, 6, 7), 2)])
    mask = np.ones(answers.shape, bool)
    mask[::2, 2] = False
    seen = model.encode_image(inputs["image"])
    read = model.encode_text(inputs["text"], inputs["text_mask"])
    context = model.answer_context(seen, model.fuse(seen, read), read)
    scores, decode = np.zeros((3, len(answers))), jax.jit(model.decode)
    for i, (answer, kept) in enumerate(zip(answers, mask, strict=True)):
        text = jnp.array(np.tile(answer, (3, 1)))
        log_p = jax.nn.log_softmax(decode(context, text))
        first, second = log_p[:, 0, answer[1]], log_p[:, 1, answer[2]]
        scores[:, i] = 2 * first + (second if kept[2] else 0)
    expected = np.argsort(-scores, axis=1)
    found, probabilities = model.rank_answers(
        context, jnp.array(answers), jnp.array(mask), top=len(answers)
    )
    np.testing.assert_array_equal(found, expected)
    exponentials = np.exp(np.take_along_axis(scores, expected, axis=1))
    shares = exponentials / exponentials.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities, shares, atol=1e-5)
    few, _ = model.rank_answers(context, jnp.array(answers), jnp.array(mask), top=2)
    assert few.shape == (3, 2)


def test_dropout_is_drawn_from_the_key():
    text = replace(PLAIN.text, dropout=0.5)
    model, inputs = model_of(replace(ANSWERING, text=text)), batch()
    inputs["decoder_text"] = inputs["text"]
    first, again = (model(**inputs, train=True, key=jax.random.key(0)) for _ in range(2))
    for name in ("mlm_logits", "logits"):
        np.testing.assert_array_equal(first[name], again[name])
        assert np.abs(first[name] - model(**inputs)[name]).max() > 1e-2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fusion_layer": 3}, "fusion_layer is 3; of the 3 layers"),
        ({"fusion_layer": 0}, "fusion_layer is 0"),
        ({"pictures": 3}, "one picture or two"),
    ],
)
def test_what_cannot_be_built_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        replace(PLAIN, **changes)


def test_what_does_not_fit_is_refused():
    inputs = batch()
    with pytest.raises(InputError, match=r"2 picture\(s\) .* and 1 came"):
        model_of(TWO)(**inputs)
    with pytest.raises(InputError, match=r"1 picture\(s\) .* and 2 came"):
        model_of(PLAIN)(**inputs, image_b=inputs["image"])
    with pytest.raises(InputError, match="no decoder of answers"):
        model_of(PLAIN)(**inputs, decoder_text=inputs["text"])
