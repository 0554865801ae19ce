"""CoCa beside a forward pass in numpy, and what each of its parts may see."""

from dataclasses import replace
from functools import cache
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.decoding import GenerationConfig
from mmjax.errors import InputError
from mmjax.models.coca import Coca, CocaConfig, CocaTextConfig
from mmjax.models.vit import ViTConfig
from tests.models import reference

WORDS, START, END = 11, 1, 3
LAYERS = {"heads": 2, "mlp_width": 20, "depth": 2}
MEAN = CocaConfig(
    image=ViTConfig(**LAYERS, width=12, image_size=16, patch_size=8, pool="mean"),
    text=CocaTextConfig(**LAYERS, width=16, vocabulary_size=WORDS, max_length=8),
    caption_queries=3,
    embedding_width=6,
    generation=GenerationConfig(bos_token_id=START, eos_token_id=END),
)
CLASS_TOKEN = replace(
    MEAN,
    image=replace(MEAN.image, pool="class_token", depth=1),
    text=replace(MEAN.text, width=12, depth=1, multimodal_depth=3, heads=3, epsilon=1e-3),
    caption_queries=5,
)


@cache
def parts(config, seed=0):
    return reference.split(lambda: Coca(config, nnx.Rngs(0)), seed)


def model_of(config, seed=0):
    return nnx.merge(*parts(config, seed))


def batch(rows=3, length=7, seed=0):
    rng = np.random.default_rng(seed)
    lengths = length - 2 * np.arange(rows)
    return {
        "image": jnp.array(rng.normal(size=(rows, 16, 16, 3)), jnp.float32),
        "text": jnp.array(rng.integers(0, WORDS, (rows, length))),
        "text_mask": jnp.array(np.arange(length) < lengths[:, None]),
    }


# ---- section 3 of the paper, one example at a time, and without padding


def attention(x, context, p, causal=False):
    mask = np.tril(np.ones((len(x), len(context)), bool)) if causal else None
    out = np.zeros((len(x), p["out"]["bias"].shape[-1])) + p["out"]["bias"]
    for head in range(p["query"]["kernel"].shape[1]):
        q, k, v = (
            source @ p[name]["kernel"][:, head] + p[name]["bias"][head]
            for name, source in (("query", x), ("key", context), ("value", context))
        )
        out += reference.attend(q, k, v, mask) @ p["out"]["kernel"][head]
    return out


def layers(x, p, depth, epsilon, context=None):
    """Left to right, with norms before the sub-layers; a context is looked at between the two."""
    for layer in reference.layers_of(p, depth):
        sub = layer["self_attention"]
        normed = reference.layer_norm(x, sub["norm"], epsilon)
        x = x + attention(normed, normed, sub["attention"], causal=True)
        if context is not None:
            sub = layer["cross_attention"]
            normed = reference.layer_norm(x, sub["norm"], epsilon)
            x = x + attention(normed, context, sub["attention"])
        mlp = layer["mlp"]
        hidden = reference.dense(reference.layer_norm(x, mlp["norm"], epsilon), mlp["up"])
        x = x + reference.dense(reference.gelu(hidden), mlp["down"])
    return x


def pooled(tokens, p, epsilon):
    return reference.layer_norm(attention(p["queries"], tokens, p["attention"]), p["norm"], epsilon)


def unit(x):
    return x / np.linalg.norm(x)


def in_numpy(params, config, image, text):
    """Unit vectors of a picture and its text, and scores of the word behind each of the text."""
    p = reference.in_float64(params)
    patches = reference.vit(p["image"], image[None], config.image)[0][0]
    seen = pooled(patches, p["image"]["caption_pooler"], config.image.epsilon)
    picture = pooled(seen, p["image"]["contrastive_pooler"], config.image.epsilon)[0]
    lower, upper, settings = p["text"], p["text_decoder"], config.text
    words = lower["token_embedding"]["embedding"][text]
    words = words + lower["position_embedding"]["embedding"][: len(text)]
    x = np.concatenate([words, lower["class_token"]])
    x = layers(x, lower["blocks"], settings.depth, settings.epsilon)
    whole = reference.layer_norm(x[-1], lower["class_norm"], settings.epsilon)
    x = layers(x[:-1], upper["blocks"], settings.multimodal_depth, settings.epsilon, seen)
    logits = reference.layer_norm(x, upper["norm"], settings.epsilon) @ upper["head"]["kernel"]
    head = p["contrastive"]
    picture = unit(picture @ head["image_projection"]["kernel"])
    return picture, unit(whole @ head["text_projection"]["kernel"]), logits


@pytest.mark.parametrize("config", [MEAN, CLASS_TOKEN], ids=["mean", "class_token"])
def test_agrees_with_the_paper(config):
    """Padding included: the other side has none."""
    inputs, params = batch(), parts(config)[1]
    out = model_of(config)(**inputs)
    lengths = np.asarray(inputs["text_mask"]).sum(axis=1)
    pictures, texts = [], []
    for row, length in enumerate(lengths):
        image, text = np.asarray(inputs["image"][row]), np.asarray(inputs["text"][row, :length])
        picture, whole, logits = in_numpy(params, config, image, text)
        np.testing.assert_allclose(out["logits"][row, :length], logits, atol=2e-5)
        pictures.append(picture)
        texts.append(whole)
    np.testing.assert_allclose(out["image_embeds"], pictures, atol=1e-5)
    np.testing.assert_allclose(out["text_embeds"], texts, atol=1e-5)
    similarities = np.exp(1.5) * np.stack(pictures) @ np.stack(texts).T
    np.testing.assert_allclose(out["logits_per_image"], similarities, atol=1e-4)


# ---- what is seen


def test_no_word_sees_those_behind_it():
    model, inputs = model_of(MEAN), batch()
    changed = inputs | {"text": (inputs["text"].at[:, 2].add(1)) % WORDS}
    out, other = model(**inputs), model(**changed)
    np.testing.assert_array_equal(out["logits"][:, :2], other["logits"][:, :2])
    assert np.abs(out["logits"][:, 2:3] - other["logits"][:, 2:3]).max(axis=(1, 2)).min() > 1e-3
    assert np.abs(out["text_embeds"] - other["text_embeds"]).max(axis=1).min() > 1e-3


def test_no_word_sees_the_class_token():
    model, inputs = nnx.clone(model_of(MEAN)), batch()
    out = model(**inputs)
    model.text.class_token[...] *= -1
    other = model(**inputs)
    np.testing.assert_array_equal(out["logits"], other["logits"])
    assert np.abs(out["text_embeds"] - other["text_embeds"]).max() > 1e-3


def test_a_text_alone_sees_no_picture():
    model, inputs = model_of(MEAN), batch()
    out, other = model(**inputs), model(**inputs | {"image": batch(seed=1)["image"]})
    np.testing.assert_array_equal(out["text_embeds"], other["text_embeds"])
    for name in ("image_embeds", "logits"):
        assert np.abs(out[name] - other[name]).max() > 1e-3, name


def test_padding_changes_nothing():
    model, inputs = model_of(MEAN), batch()
    mask = inputs["text_mask"]
    found = model(**inputs)
    other = model(**inputs | {"text": jnp.where(mask, inputs["text"], 0)})
    longer = model(
        image=inputs["image"],
        text=jnp.pad(inputs["text"], ((0, 0), (0, 1))),
        text_mask=jnp.pad(mask, ((0, 0), (0, 1))),
    )
    for out in (other, longer):
        np.testing.assert_allclose(out["text_embeds"], found["text_embeds"], atol=1e-6)
        logits = np.where(mask[..., None], out["logits"][:, :7] - found["logits"], 0)
        np.testing.assert_allclose(logits, 0, atol=1e-5)


def test_one_pass_serves_both_losses():
    model, inputs = model_of(MEAN), batch()
    image = model.encode_image(inputs["image"])
    text = model.encode_text(inputs["text"], inputs["text_mask"])
    out, fused = model(**inputs), model.fuse(image, text)
    np.testing.assert_allclose(model.score_words(fused.text_tokens), out["logits"], atol=1e-6)
    context = model.caption_context(image)
    decoded = model.decode(context, inputs["text"], inputs["text_mask"])
    np.testing.assert_allclose(decoded, out["logits"], atol=1e-6)
    last = np.asarray(inputs["text_mask"]).sum(axis=1) - 1
    np.testing.assert_array_equal(fused.pooled, fused.text_tokens[np.arange(3), last])
    whole = model.fuse(image, model.encode_text(inputs["text"]))
    np.testing.assert_array_equal(whole.pooled, whole.text_tokens[:, -1])


def test_every_parameter_learns():
    graph, params = parts(MEAN)
    inputs = batch()

    def loss(params):
        out = nnx.merge(graph, params)(**inputs)
        logits = jax.nn.log_softmax(out["logits"][:, :-1])
        words = jnp.take_along_axis(logits, inputs["text"][:, 1:, None], axis=-1)
        return -words.mean() - jnp.diag(jax.nn.log_softmax(out["logits_per_image"])).mean()

    slopes = jax.tree_util.tree_flatten_with_path(jax.jit(jax.grad(loss))(params))[0]
    for path, slope in slopes:
        name = jax.tree_util.keystr(path)
        # (a softmax over keys does not see their bias)
        assert "['key']['bias']" in name or np.abs(slope).max() > 1e-7, name


def test_dropout_is_drawn_from_the_key():
    config = replace(
        MEAN, image=replace(MEAN.image, dropout=0.5), text=replace(MEAN.text, dropout=0.5)
    )
    reference.assert_dropout_in_every_part(*parts(config), batch(), "logits")


# ---- what is written


@pytest.mark.parametrize("begun", [False, True], ids=["", "begun"])
def test_captions_are_the_likeliest_words_one_by_one(begun):
    """Without a cache: the whole text anew for every word."""
    model, images = model_of(MEAN), batch()["image"]
    beginning = np.array([[4, 5], [6, 7], [8, 9]]) if begun else None
    found = np.asarray(model.generate(images, beginning, max_length=8).tokens)
    context, decode = model.encode_image(images), jax.jit(model.decode)
    text = np.full((3, 8), END)
    text[:, 0] = START
    if begun:
        text[:, 1:3] = beginning
    for at in range(3 if begun else 1, 8):
        logits = decode(context, jnp.array(text))
        ended = (text[:, 1:at] == END).any(axis=1)
        text[:, at] = np.where(ended, END, logits[:, at - 1].argmax(axis=1))
    np.testing.assert_array_equal(found, text[:, : found.shape[1]])
    assert (text[:, found.shape[1] :] == END).all()


def test_wide_beams_find_the_best_of_all_captions():
    model, images = model_of(MEAN), batch()["image"]
    options = {"num_beams": WORDS, "max_new_tokens": 2, "length_penalty": 0.0}
    found = model.generate(images, **options, early_stopping="never")
    context = model.encode_image(images)
    firsts = np.array([[START, word] for word in range(WORDS)])
    for row in range(3):
        seen = context.take(jnp.full(WORDS, row))
        scores = np.asarray(jax.nn.log_softmax(model.decode(seen, jnp.array(firsts))))
        score = {(END,): scores[0, 0, END]}
        for first, second in product(range(WORDS), repeat=2):
            if first != END:
                score[first, second] = scores[first, 0, first] + scores[first, 1, second]
        best = max(score, key=score.get)
        assert tuple(found.tokens[row, 1 : 1 + len(best)].tolist()) == best
        np.testing.assert_allclose(found.scores[row], score[best], rtol=1e-4)


# ---- sizes


def test_sizes_are_those_of_table_1():
    for letter, width, image, text in (("B", 768, 86e6, 297e6), ("L", 1024, 303e6, 484e6)):
        config = CocaConfig(
            image=ViTConfig(size=f"{letter}/18", image_size=288, pool="mean"),
            text=CocaTextConfig(width=width, depth=12, vocabulary_size=64_000),
        )
        model = nnx.eval_shape(lambda c=config: Coca(c, nnx.Rngs(0)))
        found = {
            name: sum(leaf.size for leaf in jax.tree.leaves(nnx.state(getattr(model, name))))
            for name in ("image", "text", "text_decoder")
        }
        poolers = 8 * width**2 + 257 * width + 12 * width
        assert abs(found["image"] - poolers - image) < 1e6
        assert abs(found["text"] + found["text_decoder"] - text) < 1e6


def test_what_cannot_be_built_or_read_is_refused():
    with pytest.raises(InputError, match=r"image\.pool to 'mean'"):
        replace(MEAN, image=replace(MEAN.image, pool="attention"))
    with pytest.raises(InputError, match="vocabulary_size is 0"):
        Coca(replace(MEAN, text=replace(MEAN.text, vocabulary_size=0)), nnx.Rngs(0))
    with pytest.raises(InputError, match="9 tokens and the decoder 8 positions"):
        model_of(MEAN)(**batch(length=9))
    with pytest.raises(InputError, match="token to start from"):
        model_of(MEAN).generate(batch()["image"], bos_token_id=None)
