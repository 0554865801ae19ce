"""BLIP's parts: what sees what, what is shared, and what is written."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.decoding import GenerationConfig
from mmjax.errors import InputError
from mmjax.models.bert import BertConfig
from mmjax.models.blip import Blip, BlipConfig
from mmjax.models.vit import ViTConfig
from tests.models import reference

LAYERS = {"heads": 2, "mlp_width": 20, "depth": 2}
CLS, SEP, DEC, ENC = 2, 3, 18, 19
RETRIEVAL = BlipConfig(
    image=ViTConfig(**LAYERS, width=12, image_size=16, patch_size=8),
    text=BertConfig(**LAYERS, width=16, vocabulary_size=20, max_length=12, types=0, padding=0),
    embedding_width=6,
    matching=True,
    generation=GenerationConfig(bos_token_id=DEC, eos_token_id=SEP, pad_token_id=0),
)
PRETRAINING = replace(RETRIEVAL, decoder="image", shared=True, pair_token=ENC)
CAPTIONING = replace(RETRIEVAL, encoder=False, embedding_width=0, matching=False, decoder="image")
ANSWERING = replace(RETRIEVAL, embedding_width=0, matching=False, decoder="question")


@cache
def model_of(config, seed=0):
    return nnx.merge(*reference.split(lambda: Blip(config, nnx.Rngs(0)), seed))


def batch(rows=2, length=7, seed=0):
    rng = np.random.default_rng(seed)
    text = rng.integers(4, 18, size=(rows, length))
    text[:, 0] = CLS
    return {
        "image": jnp.array(rng.normal(size=(rows, 16, 16, 3)), jnp.float32),
        "text": jnp.array(text),
        "text_mask": jnp.array(np.arange(length) < length - np.arange(rows)[:, None]),
    }


def another_picture(inputs):
    return inputs | {"image": batch(seed=1)["image"]}


def test_a_text_alone_sees_no_picture():
    model, inputs = model_of(RETRIEVAL), batch()
    out, other = model(**inputs), model(**another_picture(inputs))
    np.testing.assert_array_equal(out["text_embeds"], other["text_embeds"])
    for name in ("image_embeds", "question_embeds", "itm_score"):
        assert np.abs(out[name] - other[name]).max() > 1e-3, name


def test_a_token_marks_a_text_beside_a_picture():
    plain, marking = (model_of(replace(PRETRAINING, pair_token=token)) for token in (-1, ENC))
    inputs = batch()
    out, marked = plain(**inputs), marking(**inputs)
    np.testing.assert_array_equal(out["text_embeds"], marked["text_embeds"])
    assert np.abs(out["itm_score"] - marked["itm_score"]).max() > 1e-3
    by_hand = plain(**inputs | {"text": inputs["text"].at[:, 0].set(ENC)})
    np.testing.assert_array_equal(by_hand["itm_score"], marked["itm_score"])


def test_a_shared_decoder_is_the_encoder_but_for_its_self_attention():
    """With the encoder's self-attention put in its place, and one token, there is no difference."""
    model = nnx.clone(model_of(PRETRAINING))
    inputs, token = batch(), jnp.array([[DEC], [DEC]])
    seen = model.encode_image(inputs["image"])

    def difference():
        encoded, decoder = model.text(token, None, seen), model.text_decoder
        words = decoder.head(encoded.tokens, model.text.embeddings)
        return float(np.abs(model.decode(seen, token) - words).max())

    assert difference() > 1e-3
    encoder_layers = model.text.blocks.layers
    model.text_decoder.bert.blocks.layers.self_attention = encoder_layers.self_attention
    assert difference() == 0


@pytest.mark.parametrize("config", [CAPTIONING, ANSWERING], ids=["captions", "answers"])
def test_words_are_written_from_left_to_right(config):
    model, inputs = model_of(config), batch()
    if not config.encoder:
        inputs = {"image": inputs["image"]}
    text = jnp.array([[DEC, 5, 6, 7], [DEC, 8, 9, SEP]])
    logits = model(**inputs, decoder_text=text)["logits"]
    changed = model(**inputs, decoder_text=text.at[:, 2].set(11))["logits"]
    np.testing.assert_array_equal(logits[:, :2], changed[:, :2])
    assert np.abs(logits[:, 2:] - changed[:, 2:]).max(axis=(0, 2)).min() > 1e-3
    other = model(**another_picture(inputs), decoder_text=text)["logits"]
    assert np.abs(logits - other).max() > 1e-3


@pytest.mark.parametrize("sees_padding", [False, True])
def test_whether_padding_of_a_question_is_seen(sees_padding):
    config = replace(ANSWERING, sees_padding=sees_padding)
    model, inputs = model_of(config), batch()
    inputs["decoder_text"] = jnp.full((2, 1), DEC)
    padding = jnp.where(inputs["text_mask"], inputs["text"], 0)
    difference = model(**inputs)["logits"] - model(**inputs | {"text": padding})["logits"]
    assert (float(np.abs(difference).max()) > 1e-3) == sees_padding


@pytest.mark.parametrize("sees_padding", [False, True])
def test_the_phases_make_the_whole(sees_padding):
    """What objectives call one after another; rows are picked with the ids they are read by."""
    model, inputs = model_of(replace(ANSWERING, sees_padding=sees_padding)), batch()
    answer = jnp.array([[DEC, 5, 6], [DEC, 8, 9]])
    whole = model.forward(**inputs, decoder_text=answer)  # not compiled in one, as its phases
    image = model.encode_image(inputs["image"])
    text = model.encode_text(inputs["text"], inputs["text_mask"])
    fused = model.fuse(image, text)
    np.testing.assert_array_equal(fused.text_tokens, whole["question_embeds"])
    logits = model.decode(model.answer_context(image, fused, text), answer)
    np.testing.assert_array_equal(logits, whole["logits"])
    order = jnp.array([1, 0])
    swapped = model.fuse(image.take(order), text.take(order))
    np.testing.assert_allclose(swapped.pooled, fused.pooled[order], atol=1e-6)


@pytest.mark.parametrize("begun", [False, True], ids=["", "begun"])
def test_captions_are_the_likeliest_words_one_by_one(begun):
    """Without a cache: the whole text anew for every word, one picture at a time."""
    model, inputs = model_of(CAPTIONING), batch(rows=3)
    lengths = 4 + np.arange(3)
    begins = np.asarray(inputs["text"]).copy()
    begins[np.arange(3), lengths - 1] = SEP
    mask = np.arange(7) < lengths[:, None]
    given = (begins, mask) if begun else (None, None)
    found = np.asarray(model.generate(inputs["image"], *given, max_new_tokens=4).tokens)
    decode = jax.jit(model.decode)
    seen = model.encode_image(inputs["image"])
    for i in range(3):
        text = [DEC, *begins[i, 1 : lengths[i] - 1]] if begun else [DEC]
        start = len(text)
        while SEP not in text[start:] and len(text) < start + 4:
            # What stands behind is not seen.
            whole = jnp.array([text + [0] * (12 - len(text))])
            logits = decode(seen.take(slice(i, i + 1)), whole)
            text.append(int(logits[0, len(text) - 1].argmax()))
        padding = found.shape[1] - 4 - start
        np.testing.assert_array_equal(found[i, padding : padding + len(text)], text)


def test_dropout_is_drawn_from_the_key():
    config = replace(PRETRAINING, text=replace(RETRIEVAL.text, dropout=0.5))
    model, inputs = model_of(config), batch()
    inputs["decoder_text"] = inputs["text"]
    first, again = (model(**inputs, train=True, key=jax.random.key(0)) for _ in range(2))
    for name in ("itm_score", "text_embeds", "logits"):
        np.testing.assert_array_equal(first[name], again[name])
        assert np.abs(first[name] - model(**inputs)[name]).max() > 1e-2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder": "images"}, "Did you mean image"),
        ({"encoder": False}, "embedding_width needs the text encoder"),
        ({"shared": True}, "only one that looks at the image"),
    ],
)
def test_what_cannot_be_built_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        replace(RETRIEVAL, **changes)


def test_what_does_not_fit_is_refused():
    inputs = batch()
    with pytest.raises(InputError, match="encodes no 'text'"):
        model_of(CAPTIONING)(**inputs)
    with pytest.raises(InputError, match="give the question as 'text'"):
        model_of(ANSWERING)(image=inputs["image"], decoder_text=inputs["text"])
    with pytest.raises(InputError, match="no decoder"):
        model_of(RETRIEVAL)(**inputs, decoder_text=inputs["text"])
    with pytest.raises(InputError, match="no decoder"):
        model_of(RETRIEVAL).generate(inputs["image"])
