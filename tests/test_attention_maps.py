"""Self-attention of the last layer: what the papers' formula gives, and nothing where not asked."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.attention_maps import last_layers
from mmjax.models import BertConfig, BertEncoder, VisionLanguageModel
from mmjax.rules import leaf_paths
from tests.models import reference
from tests.models.reference import (
    assert_close,
    in_float64,
    layers_of,
    split,
    tiny_batch,
    tiny_model,
)

BERT = BertConfig(width=32, depth=3, heads=4, mlp_width=64, vocabulary_size=40, max_length=16)


def text_batch():
    rng = np.random.default_rng(0)
    text = rng.integers(1, 40, (3, 9))
    mask = np.arange(9) < np.array([9, 5, 7])[:, None]
    return jnp.array(text), jnp.array(mask)


def last_maps(graph, params, text, mask, key=None):
    with last_layers() as stacks:
        nnx.merge(graph, params)(text, mask, key=key)
    (last,) = stacks
    (attention,) = last()
    return attention


def test_they_are_those_of_the_last_layer():
    """Queries · keys of the tokens that the layers before it leave, in plain numpy."""
    graph, params = split(lambda: BertEncoder(BERT, nnx.Rngs(0)))
    text, mask = text_batch()
    attention = last_maps(graph, params, text, mask)
    x, _ = reference.bert(params, np.asarray(text), np.asarray(mask), replace(BERT, depth=2))
    p = layers_of(in_float64(params)["blocks"], 3)[-1]["self_attention"]["attention"]
    queries, keys = (
        np.einsum("bld,dhw->bhlw", x, p[name]["kernel"]) + p[name]["bias"][:, None]
        for name in ("query", "key")
    )
    expected = np.einsum("bhqw,bhkw->bhqk", queries, keys) / np.sqrt(8)
    np.testing.assert_allclose(attention.scores, expected, atol=1e-4)
    np.testing.assert_array_equal(
        attention.visible, np.repeat(np.asarray(mask)[:, None], 9, axis=1)
    )


@pytest.mark.parametrize("how", [{"unroll": True}, {"remat": "full"}, {"remat": "dots"}], ids=str)
def test_scores_and_gradients_do_not_depend_on_how_layers_run(how):
    text, mask = text_batch()

    def of(config):
        graph, params = split(lambda: BertEncoder(config, nnx.Rngs(0)))

        def square(params):
            scores = last_maps(graph, params, text, mask, jax.random.key(3)).scores
            return jnp.square(scores).mean(), scores

        return jax.jit(jax.grad(square, has_aux=True))(params)

    config = replace(BERT, dropout=0.1)
    gradients, scores = of(config)
    other_gradients, other_scores = of(replace(config, **how))
    np.testing.assert_allclose(other_scores, scores, atol=1e-5)
    assert_close(other_gradients, gradients)
    path = "blocks/layers/self_attention/attention/query/kernel"
    slopes = dict(zip(leaf_paths(gradients), jax.tree.leaves(gradients), strict=True))[path]
    assert all(np.abs(np.asarray(slopes)).max(axis=(1, 2, 3)) > 1e-4)  # every layer's, and the last


def test_what_nobody_asks_for_is_not_computed():
    graph, params = split(lambda: BertEncoder(BERT, nnx.Rngs(0)))
    text, mask = text_batch()

    def encode(params, recorded, asked):
        model = nnx.merge(graph, params)
        if not recorded:
            return model(text, mask).tokens
        with last_layers() as stacks:
            tokens = model(text, mask).tokens
        return (tokens, stacks[-1]()[0].scores) if asked else tokens

    def flops(recorded, asked=False):
        jitted = jax.jit(encode, static_argnums=(1, 2)).lower(params, recorded, asked)
        return jitted.compile().cost_analysis()["flops"]

    assert flops(recorded=True) == flops(recorded=False)
    assert flops(recorded=True, asked=True) > flops(recorded=True)


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [("co_attention", [10, 11]), ("merged", [21]), ("cross_attention", [11])],
)
def test_every_stream_of_a_fusion_has_one(kind, tokens):
    config = tiny_model(fusion_kind=kind)
    graph, params = split(lambda: VisionLanguageModel(config, nnx.Rngs(0)))
    model, batch = nnx.merge(graph, params), jax.tree.map(jnp.asarray, tiny_batch(config, 4))
    image = model.encode_image(batch["image"])
    text = model.encode_text(batch["text"], batch["text_mask"])
    with last_layers() as stacks:
        model.fuse(image, text)
    attentions = stacks[-1]()
    assert [x.scores.shape for x in attentions] == [(4, 4, n, n) for n in tokens]
    seen = attentions[-1].visible[:, 0, :11]  # (the text is the last stream, or the first part)
    np.testing.assert_array_equal(np.broadcast_to(seen, (4, 11)), batch["text_mask"])
    assert attentions[0].visible[:, :, -10:].all() or kind == "cross_attention"
