"""GPT-2, on its own and writing about pictures."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.errors import InputError
from mmjax.models.captioner import Captioner, CaptionerConfig
from mmjax.models.features import Encoded
from mmjax.models.gpt2 import GPT2, GPT2Config, LanguageModel, LanguageModelConfig
from mmjax.models.vit import ViTConfig
from tests.models import reference

SMALL = GPT2Config(width=24, depth=2, heads=3, mlp_width=32, vocabulary_size=30, max_length=12)
IMAGE = ViTConfig(width=16, depth=1, heads=2, mlp_width=24, image_size=16, patch_size=8)


def built(make, seed=0):
    graph, params = reference.split(make, seed)
    return nnx.merge(graph, params), params


def texts(rows=3, length=7):
    return jnp.array(np.random.default_rng(0).integers(0, 30, (rows, length)), jnp.int32)


def tanh_gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def attended(x, context, p, mask):
    """Heads one by one; `mask` is [B, Q, K]."""
    out = np.zeros((*x.shape[:2], SMALL.width)) + p["out"]["bias"]
    for b, head in np.ndindex(len(x), SMALL.heads):
        q, k, v = (
            source[b] @ p[name]["kernel"][:, head] + p[name]["bias"][head]
            for name, source in (("query", x), ("key", context), ("value", context))
        )
        out[b] += reference.attend(q, k, v, mask[b]) @ p["out"]["kernel"][head]
    return out


def in_numpy(params, text, mask, context=None, context_mask=None):
    """Radford et al. 2019, section 2.3: norms before the sub-layers, and one at the end."""
    p = reference.in_float64(params)
    words, epsilon = p["token_embedding"]["embedding"], SMALL.epsilon
    x = words[text] + p["position_embedding"]["embedding"][: text.shape[1]]
    visible = np.tril(np.ones((text.shape[1],) * 2, bool)) & mask[:, None]
    for layer in reference.layers_of(p["blocks"], SMALL.depth):
        sub = layer["self_attention"]
        normed = reference.layer_norm(x, sub["norm"], epsilon)
        x = x + attended(normed, normed, sub["attention"], visible)
        if context is not None:
            sub = layer["cross_attention"]
            normed = reference.layer_norm(x, sub["norm"], epsilon)
            x = x + attended(normed, context, sub["attention"], context_mask[:, None])
        mlp = layer["mlp"]
        hidden = reference.dense(reference.layer_norm(x, mlp["norm"], epsilon), mlp["up"])
        x = x + reference.dense(tanh_gelu(hidden), mlp["down"])
    return reference.layer_norm(x, p["norm"], epsilon) @ words.T


@pytest.mark.parametrize("cross", [False, True], ids=["", "cross"])
def test_agrees_with_the_paper(cross):
    model, params = built(lambda: GPT2(SMALL, nnx.Rngs(0), cross))
    mask = jnp.array(np.arange(7) < np.array([[7], [5], [2]]))
    context, seen = None, ()
    if cross:
        tokens = np.random.default_rng(1).normal(size=(3, 4, 24)).astype(np.float32)
        seen = tokens, np.arange(4) < np.array([[4], [1], [3]])
        context = Encoded(*map(jnp.asarray, seen), pooled=jnp.array(tokens[:, 0]))
    found = model(texts(), mask, context)
    expected = in_numpy(params, np.asarray(texts()), np.asarray(mask), *seen)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_no_word_sees_those_behind_it():
    model, _ = built(lambda: LanguageModel(LanguageModelConfig(SMALL), nnx.Rngs(0)))
    changed = texts().at[:, 4].set(0)
    before, after = (model(text=text)["logits"] for text in (texts(), changed))
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert np.abs(before[:, 4:] - after[:, 4:]).max(axis=(1, 2)).min() > 0.01


def test_a_caption_hangs_on_its_picture():
    for width in (24, 16):
        config = CaptionerConfig(image=replace(IMAGE, width=width), text=SMALL)
        model, params = built(lambda c=config: Captioner(c, nnx.Rngs(0)))
        assert ("projection" in params) == (width == 16)
        image = np.random.default_rng(0).normal(size=(3, 16, 16, 3)).astype(np.float32)
        out = model(image=image, decoder_text=texts())
        assert out["logits"].shape == (3, 7, 30)
        assert out["encoder_last_hidden_state"].shape == (3, 5, width)
        other = model(image=image[[0, 2, 1]], decoder_text=texts())["logits"]
        np.testing.assert_allclose(other[0], out["logits"][0], atol=1e-5)
        assert np.abs(other[1:] - out["logits"][1:]).max() > 0.01


def test_dropout_is_drawn_by_the_key():
    config = LanguageModelConfig(replace(SMALL, dropout=0.5))
    model, _ = built(lambda: LanguageModel(config, nnx.Rngs(0)))
    once, again, other = (
        model(text=texts(), train=True, key=jax.random.key(seed))["logits"] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(once, again)
    assert np.abs(once - other).max() > 0.1
    plain, _ = built(lambda: LanguageModel(LanguageModelConfig(SMALL), nnx.Rngs(0)))
    np.testing.assert_array_equal(model(text=texts())["logits"], plain(text=texts())["logits"])


def test_half_precision_keeps_scores_in_float32():
    exact, _ = built(lambda: GPT2(SMALL, nnx.Rngs(0)))
    half, _ = built(lambda: GPT2(replace(SMALL, dtype="bfloat16"), nnx.Rngs(0)))
    found, expected = half(texts()), exact(texts())
    assert found.dtype == jnp.float32
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


def test_named_sizes():
    for size, parameters in (("small", 124_439_808), ("xl", 1_557_611_200)):
        config = GPT2Config(size=size, vocabulary_size=50257)
        shapes = nnx.eval_shape(lambda c=config: GPT2(c, nnx.Rngs(0)))
        assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(shapes))) == parameters


def test_what_cannot_be_built_or_read_is_refused():
    with pytest.raises(InputError, match=r"'smal'.*small"):
        GPT2Config(size="smal", vocabulary_size=9)
    with pytest.raises(InputError, match="vocabulary_size"):
        GPT2Config(size="small")
    model, _ = built(lambda: GPT2(SMALL, nnx.Rngs(0)))
    with pytest.raises(InputError, match="13 tokens and the decoder 12 positions"):
        model(texts(length=13))
