"""A captioner whose decoder is a BERT: what it sees, and what it writes."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mmjax
from mmjax.decoding import GenerationConfig
from mmjax.errors import InputError
from mmjax.models.bert import BertConfig
from mmjax.models.captioner import Captioner, CaptionerConfig
from mmjax.models.gpt2 import GPT2Config
from mmjax.models.vit import ViTConfig
from tests.models import reference

CLS, SEP, WORDS = 1, 3, 12
LAYERS = {"heads": 2, "mlp_width": 20, "depth": 2, "width": 16}
BERT = CaptionerConfig(
    image=ViTConfig(**LAYERS, image_size=16, patch_size=8),
    text=BertConfig(**LAYERS, vocabulary_size=WORDS, max_length=8),
    generation=GenerationConfig(bos_token_id=CLS, eos_token_id=SEP, pad_token_id=0),
)
PROJECTED = replace(BERT, image=replace(BERT.image, width=12), text=replace(BERT.text, norm="pre"))
GPT2 = replace(BERT, text=GPT2Config(**LAYERS, vocabulary_size=WORDS, max_length=8))


@cache
def model_of(config):
    return nnx.merge(*reference.split(lambda: Captioner(config, nnx.Rngs(0))))


def batch(rows=3, length=6, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": jnp.array(rng.normal(size=(rows, 16, 16, 3)), jnp.float32),
        "decoder_text": jnp.array(rng.integers(0, WORDS, (rows, length))),
        "decoder_mask": jnp.array(np.arange(length) < length - np.arange(rows)[:, None]),
    }


# ---- Devlin et al. 2019 from left to right, one example at a time, without padding


def in_numpy(params, config, image, text):
    p, settings = reference.in_float64(params), config.text
    seen = reference.vit(p["image"], image[None], config.image)[0]
    if "projection" in p:
        seen = reference.dense(seen, p["projection"])
    bert, head = p["text"]["bert"], p["text"]["head"]
    tables = bert["embeddings"]
    x = tables["token_embedding"]["embedding"][text] + tables["type_embedding"]["embedding"][0]
    x = x + tables["position_embedding"]["embedding"][: len(text)]
    x = reference.layer_norm(x, tables["norm"], settings.epsilon)
    pre = settings.norm == "pre"

    def attended(x, sub, context):
        """A token at a time, so that it sees those before it and no more."""
        normed = reference.layer_norm(x, sub["norm"], settings.epsilon) if pre else x
        found = []
        for at in range(len(x)):
            keys = normed[: at + 1] if context is None else context
            query = normed[None, at : at + 1]
            found.append(reference.multi_head(query, keys[None], sub["attention"], None)[0, 0])
        x = x + np.array(found)
        return x if pre else reference.layer_norm(x, sub["norm"], settings.epsilon)

    for layer in reference.layers_of(bert["blocks"], settings.depth):
        x = attended(x, layer["self_attention"], None)
        x = attended(x, layer["cross_attention"], seen[0])
        x = reference.mlp_sublayer(x, layer["mlp"], settings)
    x = reference.layer_norm(x, bert["norm"], settings.epsilon) if pre else x
    x = reference.gelu(reference.dense(x, head["transform"]))
    x = reference.layer_norm(x, head["norm"], settings.epsilon)
    return x @ tables["token_embedding"]["embedding"].T + head["bias"]


@pytest.mark.parametrize("config", [BERT, PROJECTED], ids=["same_width", "projected"])
def test_a_bert_that_writes_agrees_with_numpy(config):
    params = reference.split(lambda: Captioner(config, nnx.Rngs(0)))[1]
    inputs = batch()
    logits = model_of(config)(**inputs)["logits"]
    for row, length in enumerate(np.asarray(inputs["decoder_mask"]).sum(axis=1)):
        image, text = np.asarray(inputs["image"][row]), np.asarray(inputs["decoder_text"][row])
        expected = in_numpy(params, config, image, text[:length])
        np.testing.assert_allclose(logits[row, :length], expected, atol=5e-5)


def test_no_word_sees_those_behind_it():
    inputs = batch()
    changed = inputs["decoder_text"].at[:, 3].add(1) % WORDS
    model = model_of(PROJECTED)
    before, after = (
        model(image=inputs["image"], decoder_text=text)["logits"]
        for text in (inputs["decoder_text"], changed)
    )
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert np.abs(before[:, 3:] - after[:, 3:]).max(axis=(1, 2)).min() > 1e-3


@pytest.mark.parametrize("config", [BERT, PROJECTED, GPT2], ids=["bert", "projected", "gpt2"])
def test_the_phases_are_the_whole(config):
    """Captions decoded from a picture that was encoded once."""
    model, inputs = model_of(config), batch()
    assert model.text_decoder is model.text
    context = model.caption_context(model.encode_image(inputs["image"]))
    assert context.tokens.shape[-1] == 16
    logits = model.decode(context, inputs["decoder_text"], inputs["decoder_mask"])
    np.testing.assert_allclose(logits, model(**inputs)["logits"], atol=1e-6)


@pytest.mark.parametrize("begun", [False, True], ids=["", "begun"])
@pytest.mark.parametrize("config", [BERT, PROJECTED, GPT2], ids=["bert", "projected", "gpt2"])
def test_captions_are_the_likeliest_words_one_by_one(config, begun):
    """Without a cache: the whole text anew for every word."""
    model, images = model_of(config), batch()["image"]
    beginning = np.array([[4, 5], [6, 7], [8, 9]]) if begun else None
    found = np.asarray(model.generate(images, beginning, max_length=8).tokens)
    context, decode = model.caption_context(model.encode_image(images)), jax.jit(model.decode)
    text = np.zeros((3, 8), int)
    text[:, 0] = CLS
    if begun:
        text[:, 1:3] = beginning
    for at in range(3 if begun else 1, 8):
        logits = decode(context, jnp.array(text))
        ended = (text[:, 1:at] == SEP).any(axis=1)
        text[:, at] = np.where(ended, 0, logits[:, at - 1].argmax(axis=1))
    np.testing.assert_array_equal(found, text[:, : found.shape[1]])
    assert (text[:, found.shape[1] :] == 0).all()


def test_dropout_is_drawn_from_the_key():
    config = replace(BERT, text=replace(BERT.text, dropout=0.5))
    model, inputs = model_of(config), batch()
    once, again, other = (
        model(**inputs, train=True, key=jax.random.key(n))["logits"] for n in (0, 0, 1)
    )
    np.testing.assert_array_equal(once, again)
    assert np.abs(once - other).max() > 0.1
    np.testing.assert_array_equal(model(**inputs)["logits"], model_of(BERT)(**inputs)["logits"])


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(InputError, match="9 tokens"):
        model_of(BERT)(**batch(length=9))
    with pytest.raises(InputError, match="no published format holds this Captioner"):
        mmjax.save_huggingface(model_of(BERT), tmp_path)
