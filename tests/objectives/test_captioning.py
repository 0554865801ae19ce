"""Captions word by word: what is asked, what counts, and that nothing is seen before its time."""

from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.data.tokenizer import TextTokenizer
from mmjax.decoding import GenerationConfig
from mmjax.models import Encoded, Fused
from mmjax.models.bert import BertConfig
from mmjax.models.blip import Blip, BlipConfig
from mmjax.models.vit import ViTConfig
from mmjax.objectives.captioning import Captioning, PrefixLanguage, cut_captions
from mmjax.objectives.features import Features
from mmjax.objectives.masked_language import word_loss
from tests.models import reference

WORDS, LENGTH = 20, 9
PAD, CLS, SEP, DEC = 0, 2, 3, 18
KEY = jax.random.key(0)


def captions(rows, seed=0):
    """[CLS] words [SEP] and padding, of several lengths."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, LENGTH + 1, rows)
    text = rng.integers(4, 18, (rows, LENGTH)).astype(np.int32)
    text[:, 0], text[np.arange(rows), lengths - 1] = CLS, SEP
    mask = np.arange(LENGTH) < lengths[:, None]
    return np.where(mask, text, PAD), mask


def expected_words(logits, targets, smoothing):
    """−Σ q log p, q a share of the word and the rest of all words evenly."""
    x = logits.astype(np.float64)
    log_p = x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
    q = (1 - smoothing) * np.eye(x.shape[-1])[targets] + smoothing / x.shape[-1]
    return -(q * log_p).sum(axis=-1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_smoothed_labels(smoothing):
    rng = np.random.default_rng(0)
    logits = 3 * rng.normal(size=(3, 5, 7)).astype(np.float32)
    targets = rng.integers(0, 7, (3, 5))
    found = word_loss(jnp.array(logits), jnp.array(targets), smoothing)
    np.testing.assert_allclose(found, expected_words(logits, targets, smoothing), rtol=1e-5)
    gradient = jax.grad(lambda x: word_loss(x, jnp.array(targets), smoothing).sum())
    p = np.exp(logits.astype(np.float64))
    q = (1 - smoothing) * np.eye(7)[targets] + smoothing / 7
    expected = p / p.sum(axis=-1, keepdims=True) - q
    np.testing.assert_allclose(gradient(jnp.array(logits)), expected, atol=1e-6)


def stub(text, mask, valid, logits, tokenizer=None):
    """Features of a model that answers `logits` and records what it was given."""
    seen = {}

    def decode(context, decoder_text, decoder_mask, key):
        seen.update(context=context, text=np.asarray(decoder_text), mask=np.asarray(decoder_mask))
        return jnp.array(logits)

    given = object.__new__(Features)
    given.model = SimpleNamespace(caption_context=lambda image: ("of", image), decode=decode)
    given.batch = {
        "text": jnp.array(text), "text_mask": jnp.array(mask), "valid": jnp.array(valid),
    }  # fmt: skip
    given.key, given.tokenizer = None, tokenizer
    given.__dict__["image"] = "picture"
    return given, seen


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("start_id", [-1, DEC])
def test_every_word_is_asked_of_those_before_it(smoothing, start_id):
    text, mask = captions(6)
    valid = np.arange(6) != 4
    logits = np.random.default_rng(1).normal(size=(6, LENGTH - 1, WORDS)).astype(np.float32)
    features, seen = stub(text, mask, valid, logits)
    loss = Captioning(smoothing=smoothing, start_id=start_id)(features, KEY)
    assert seen["context"] == ("of", "picture")
    np.testing.assert_array_equal(seen["text"][:, 0], CLS if start_id < 0 else DEC)
    np.testing.assert_array_equal(seen["text"][:, 1:], text[:, 1:-1])
    np.testing.assert_array_equal(seen["mask"], mask[:, :-1])
    words = expected_words(logits, text[:, 1:], smoothing)
    counted = [(b, t) for b in range(6) for t in range(mask[b].sum() - 1) if valid[b]]
    np.testing.assert_allclose(loss.total, sum(words[place] for place in counted), rtol=1e-5)
    assert loss.weight == len(counted)
    hits, weight = loss.metrics["captioning/accuracy"]
    right = [logits[place].argmax() == text[:, 1:][place] for place in counted]
    assert (hits, weight) == (sum(right), len(counted))


def test_a_prompt_is_given_not_asked():
    """It stands between the first token and the caption, as the tokenizer spells it."""
    sentences = ["a picture of a cube", "two pictures of a ball", "a cube of two"] * 3
    tokenizer = TextTokenizer.train(sentences, 80)
    ids, there = tokenizer.encode("a picture of", 20)
    prompt = ids[there][1:-1]
    text, mask = map(np.array, zip(*(tokenizer.encode(s, 12) for s in sentences[:3]), strict=True))
    length = text.shape[1] + len(prompt) - 1
    logits = np.random.default_rng(2).normal(size=(3, length, 80)).astype(np.float32)
    features, seen = stub(text, mask, [True, True, False], logits, tokenizer)
    loss = Captioning(prompt="a picture of ")(features, KEY)
    total = count = 0
    for b in range(2):
        caption = text[b][mask[b]]
        whole = [caption[0], *prompt, *caption[1:]]
        np.testing.assert_array_equal(seen["text"][b, : len(whole) - 1], whole[:-1])
        np.testing.assert_array_equal(np.flatnonzero(seen["mask"][b])[-1] + 1, len(whole))
        for t in range(len(prompt), len(whole) - 1):
            total += expected_words(logits[b, t], whole[t + 1], 0.0)
            count += 1
    np.testing.assert_allclose(loss.total, total, rtol=1e-5)
    assert loss.weight == count


LAYERS = {"heads": 2, "mlp_width": 20, "depth": 1, "width": 12}


@cache
def blip(encoder=True):
    config = BlipConfig(
        image=ViTConfig(**LAYERS, image_size=16, patch_size=8),
        text=BertConfig(**LAYERS, vocabulary_size=WORDS, max_length=12, types=0, padding=0),
        encoder=encoder,
        decoder="image",
        generation=GenerationConfig(bos_token_id=DEC, eos_token_id=SEP, pad_token_id=PAD),
    )
    return nnx.merge(*reference.split(lambda: Blip(config, nnx.Rngs(0)), seed=3))


def batch(text, mask, valid=None):
    rows = len(text)
    image = np.random.default_rng(5).normal(size=(rows, 16, 16, 3)).astype(np.float32)
    valid = np.ones(rows, bool) if valid is None else valid
    fields = {"image": image, "text": text, "text_mask": mask, "valid": valid}
    return {name: jnp.array(x) for name, x in {**fields, "index": np.arange(rows)}.items()}


def test_the_loss_of_a_generated_caption_is_its_score():
    """Word by word from a cache, and in one pass: log p of the same words."""
    model = blip(encoder=False)
    fields = batch(np.full((3, 1), CLS, np.int32), np.ones((3, 1), bool))
    written = model.generate(fields["image"], max_new_tokens=6, num_beams=1)
    tokens = np.asarray(written.tokens)
    ends = np.where((tokens == SEP).any(axis=1), (tokens == SEP).argmax(axis=1), tokens.shape[1])
    mask = np.arange(tokens.shape[1]) <= ends[:, None]
    given = fields | {"text": jnp.array(tokens), "text_mask": jnp.array(mask)}
    loss = Captioning()(Features(model, given), KEY)
    np.testing.assert_allclose(loss.total, -np.asarray(written.scores).sum(), rtol=1e-5)
    assert loss.weight == mask[:, 1:].sum()
    accuracy, _ = loss.metrics["captioning/accuracy"]
    assert accuracy == loss.weight  # greedy: every word was the likeliest


def test_padding_and_invalid_rows_change_nothing():
    text, mask = captions(4, seed=1)
    valid = np.array([True, False, True, True])
    model = blip()
    for objective in (Captioning(smoothing=0.1), PrefixLanguage(smoothing=0.1)):
        losses = []
        for filler in (PAD, 7):
            other = np.where(mask & valid[:, None], text, filler).astype(np.int32)
            losses.append(objective(Features(model, batch(other, mask, valid)), KEY))
        np.testing.assert_allclose(losses[0].total, losses[1].total, rtol=1e-5)
        assert losses[0].weight == losses[1].weight > 0
        shorter = batch(text[[0, 2, 3]], mask[[0, 2, 3]])
        shorter |= {"image": batch(text, mask)["image"][jnp.array([0, 2, 3])]}
        shorter["index"] = jnp.array([0, 2, 3])
        alone = objective(Features(model, shorter), KEY)
        np.testing.assert_allclose(losses[0].total, alone.total, rtol=1e-5)


# ---- the second part of a caption, given the first


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.999])
def test_where_captions_are_cut(share):
    text, mask = captions(7, seed=2)
    text[6], mask[6] = np.where(np.arange(LENGTH) == 0, CLS, PAD), np.arange(LENGTH) < 1
    arrays = map(np.asarray, cut_captions(jnp.array(text), jnp.array(mask), jnp.full(7, share)))
    for row, kept, prefix, rest, rest_mask in zip(text, mask, *arrays, strict=True):
        words = list(row[kept])
        count = 1 + int(share * (len(words) - 1))
        np.testing.assert_array_equal(prefix, np.arange(LENGTH) < count)
        assert list(rest[rest_mask]) == [words[0], *words[count:]]
        assert rest_mask.sum() == 1 + len(words) - count
        assert len(words) == 1 or rest_mask.sum() > 1  # something is left to be asked


def given_cut(monkeypatch, share):
    monkeypatch.setattr(jax.random, "uniform", lambda key: jnp.array(share))


def test_all_of_the_first_part_is_seen_and_nothing_ahead(monkeypatch):
    """The scores of a word, as other words and the picture change."""
    model, text = blip(), np.array([[CLS, 5, 6, 7, 8, 9, 10, SEP, PAD]], np.int32)
    given = batch(text, text != PAD)
    given_cut(monkeypatch, 0.5)  # 4 tokens are given, 4 are asked

    def scores(**changes):
        return np.asarray(PrefixLanguage()(Features(model, given | changes), KEY).scores[0][0])

    plain = scores()
    for place in range(1, 8):
        other = scores(text=given["text"].at[0, place].set(11))
        # The word at column 4 + j is asked by score j, and seen from score j + 1 on.
        unseen = 0 if place < 4 else place - 4 + 1
        np.testing.assert_allclose(other[:unseen], plain[:unseen], atol=1e-5)
        assert (np.abs(other - plain)[unseen:4].max(axis=1, initial=0) > 1e-4).all(), place
    picture = scores(image=given["image"][:, ::-1])
    assert (np.abs(picture - plain)[:4].max(axis=1) > 1e-4).all()


def test_the_second_part_is_written_as_a_text_of_its_own(monkeypatch):
    """Encoded, fused and decoded one after another, with no padding at all."""
    model, text = blip(), np.array([[CLS, 5, 6, 7, 8, 9, 10, SEP, PAD]], np.int32)
    given = batch(text, text != PAD)
    given_cut(monkeypatch, 0.3)
    loss = PrefixLanguage(start_id=DEC)(Features(model, given), KEY)
    image = model.encode_image(given["image"])
    read = model.encode_text(given["text"][:, :3], jnp.ones((1, 3), bool))
    fused = model.fuse(image, read)
    both = Encoded(
        jnp.concatenate([fused.image_tokens, fused.text_tokens], axis=1), None, fused.pooled
    )
    logits = np.asarray(model.decode(both, jnp.array([[DEC, 7, 8, 9, 10]])))
    expected = expected_words(logits[0], np.array([7, 8, 9, 10, SEP]), 0.0)
    np.testing.assert_allclose(loss.total, expected.sum(), rtol=1e-5)
    assert loss.weight == 5


def test_cuts_are_even_and_belong_to_examples():
    """Of eight tokens seven places to cut; the same example is cut alike in any row."""
    rows = 7000
    text = np.tile(np.array([CLS, 5, 6, 7, 8, 9, 10, SEP], np.int32), (rows, 1))
    cuts = {}

    def encode_text(text, text_mask, key):
        cuts["seen"] = np.asarray(text_mask).sum(axis=1)
        return Encoded(jnp.zeros((len(text), 1, 1)), None, jnp.zeros((len(text), 1)))

    tokens = jnp.zeros((rows, 1, 1))
    model = SimpleNamespace(
        encode_text=encode_text,
        encode_image=lambda image, key: Encoded(tokens, None, tokens[:, 0]),
        fuse=lambda image, text, key: Fused(tokens, tokens, tokens[:, 0]),
        decode=lambda context, text, mask, key: jnp.zeros((rows, 7, WORDS)),
    )
    fields = {"image": tokens, "text": text, "text_mask": text > 0, "valid": np.ones(rows, bool)}

    def cut(index):
        given = {k: jnp.array(v) for k, v in {**fields, "index": index}.items()}
        PrefixLanguage()(Features(model, given), KEY)
        return cuts["seen"]

    index = np.random.default_rng(0).permutation(10**6)[:rows]
    found = cut(index)
    counts = np.bincount(found, minlength=9)[1:]
    assert counts[7] == 0
    assert ((counts[:7] - 1000) ** 2 / 1000).sum() < 27.9  # the 0.9999 quantile for 6 degrees
    order = np.random.default_rng(1).permutation(rows)
    np.testing.assert_array_equal(cut(index[order]), found[order])
