"""Masked language modelling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.objectives import Features, Masking
from mmjax.objectives.loss import example_keys, purpose_key
from mmjax.objectives.masked_language import MaskedLanguage, MaskedLanguageAlone, word_loss
from mmjax.objectives.masking import mask_tokens
from tests.objectives.fakes import (
    CONTINUES,
    MASK,
    SPECIAL,
    WORDS,
    FakeModel,
    FakeTokenizer,
    batch_of,
)


def texts(rows, length=20, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, length + 1, rows)
    mask = np.arange(length) < lengths[:, None]
    text = rng.integers(5, WORDS, (rows, length))
    text[:, 0] = 2
    text[np.arange(rows), lengths - 1] = 3
    text[:, 2] = np.where(rng.random(rows) < 0.5, 1, text[:, 2])
    return np.where(mask, text, 0).astype(np.int32), mask


def corrupt(text, maskable, key=0, index=None, rate=0.15, whole_words=False):
    index = np.arange(len(text)) if index is None else index
    keys = example_keys(jax.random.key(key), jnp.array(index))
    continues = jnp.array(FakeTokenizer().continues) if whole_words else None
    out = jax.jit(
        lambda text, maskable: mask_tokens(
            text,
            maskable,
            keys,
            rate=rate,
            mask_id=MASK,
            vocabulary_size=WORDS,
            continues=continues,
        )
    )(jnp.array(text), jnp.array(maskable))
    return [np.asarray(x) for x in out]


def test_fifteen_percent_at_eighty_ten_ten():
    text, mask = texts(8000)
    maskable = mask & ~np.isin(text, SPECIAL)
    masked, chosen = corrupt(text, maskable)
    assert not chosen[~maskable].any()
    np.testing.assert_array_equal(masked[~chosen], text[~chosen])

    def share(found, count, p):
        """Within five standard deviations of the binomial."""
        assert abs(found / count - p) < 5 * np.sqrt(p * (1 - p) / count), (found / count, p)

    count = chosen.sum()
    share(count, maskable.sum(), 0.15)
    share((masked[chosen] == MASK).sum(), count, 0.8 + 0.1 / WORDS)
    share((masked[chosen] == text[chosen]).sum(), count, 0.1 + 0.1 / WORDS)
    other = chosen & (masked != MASK) & (masked != text)
    words = np.bincount(masked[other], minlength=WORDS)
    assert words[np.arange(WORDS) != MASK].min() > 0  # every word of the vocabulary
    # No position is favoured, and neighbours are chosen independently.
    by_position = chosen[:, 3:-1].sum(axis=0) / maskable[:, 3:-1].sum(axis=0)
    assert np.abs(by_position - 0.15).max() < 0.05
    both = maskable[:, 3:-1] & maskable[:, 4:]
    share((chosen[:, 3:-1] & chosen[:, 4:])[both].sum(), both.sum(), 0.15**2)


@pytest.mark.parametrize(("rate", "expected"), [(0.0, 0.0), (1.0, 1.0)])
def test_the_rate_is_the_rate(rate, expected):
    text, mask = texts(10)
    _, chosen = corrupt(text, mask, rate=rate)
    assert chosen[mask].mean() == expected


def test_masks_belong_to_examples_not_to_rows():
    text, mask = texts(30)
    index = np.random.default_rng(5).permutation(10_000)[:30]
    order = np.random.default_rng(6).permutation(30)
    masked, chosen = corrupt(text, mask, index=index)
    again, chosen_again = corrupt(text[order], mask[order], index=index[order])
    np.testing.assert_array_equal(again, masked[order])
    np.testing.assert_array_equal(chosen_again, chosen[order])
    other, _ = corrupt(text, mask, key=1, index=index)
    assert (other != masked).any()
    same_text = np.repeat(text[:1], 30, axis=0)
    _, chosen = corrupt(same_text, np.ones_like(mask), index=index)
    assert len(np.unique(chosen, axis=0)) > 20


def test_whole_words_are_masked_or_left():
    text, mask = texts(4000)
    maskable = mask & ~np.isin(text, SPECIAL)
    masked, chosen = corrupt(text, maskable, rate=0.3, whole_words=True)
    assert not chosen[~maskable].any()
    # A piece, and one behind it that goes on with the same word.
    goes_on = (text[:, 1:] >= CONTINUES) & maskable[:, 1:] & maskable[:, :-1]
    assert goes_on.sum() > 1000
    np.testing.assert_array_equal(chosen[:, 1:][goes_on], chosen[:, :-1][goes_on])
    # Words are chosen at the rate, and independently of their neighbours.
    starts = maskable & (text < CONTINUES)
    deviation = np.sqrt(0.3 * 0.7 / starts.sum())
    assert abs(chosen[starts].mean() - 0.3) < 5 * deviation
    both = starts[:, 1:] & maskable[:, :-1]
    assert abs((chosen[:, 1:] & chosen[:, :-1])[both].mean() - 0.09) < 0.01
    # What becomes of a piece is its own affair.
    replaced = masked == MASK
    pieces = goes_on & chosen[:, 1:]
    assert (replaced[:, 1:] != replaced[:, :-1])[pieces].any()


class WordModel(FakeModel):
    """Answers `logits` at every position, and remembers the text that it saw."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def score_words(self, tokens):
        self.seen = np.asarray(tokens[..., 0]).astype(int)
        return jnp.array(self.logits)

    score_words_alone = score_words


def run(text, mask, valid, logits, objective=MaskedLanguage(), whole_words=False):  # noqa: B008
    """The loss, and the text as the model read it."""
    batch = batch_of(len(text), text=text, text_mask=mask, valid=valid)
    batch["image"], model = jnp.zeros((len(text), 1)), WordModel(logits)
    masking = Masking(words=0.5, whole_words=whole_words)
    features = Features(model, batch, tokenizer=FakeTokenizer(), masking=masking)
    return objective(features, jax.random.key(0)), model.seen


def test_a_picture_of_which_nothing_can_be_hidden_is_seen_as_a_whole():
    """Words alone are then masked, also where both sides were to be."""
    text, mask = texts(4, 9)
    batch = batch_of(4, text=text, text_mask=mask, image=np.ones((4, 1), np.float32))
    masking = Masking(words=0.5, conditional=False)
    features = Features(FakeModel(), batch, tokenizer=FakeTokenizer(), masking=masking)
    masked = features.words_masked
    assert masked.chosen.any()
    np.testing.assert_array_equal(masked.image.tokens, features.image.tokens)


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize(
    ("objective", "name"),
    [(MaskedLanguage(), "masked_language"), (MaskedLanguageAlone(), "masked_language_alone")],
)
@pytest.mark.parametrize(("rows", "length"), [(6, 20), (3, 9)])
def test_agrees_with_plain_cross_entropy(rows, length, objective, name, whole_words):
    text, mask = texts(rows, length)
    valid = np.arange(rows) != 1
    logits = np.random.default_rng(0).normal(size=(rows, length, WORDS)).astype(np.float32)
    loss, seen = run(text, mask, valid, logits, objective, whole_words)
    maskable = mask & ~np.isin(text, SPECIAL) & valid[:, None]
    np.testing.assert_array_equal(seen[~maskable], text[~maskable])
    keys = example_keys(purpose_key(jax.random.key(0), "masked_language"), jnp.arange(rows))
    _, chosen = mask_tokens(
        jnp.array(text), jnp.array(maskable), keys, rate=0.5, mask_id=MASK,
        vocabulary_size=WORDS,
        continues=jnp.array(FakeTokenizer().continues) if whole_words else None,
    )  # fmt: skip
    chosen = np.asarray(chosen)
    assert chosen[seen != text].all()
    x = logits.astype(np.float64)
    log_p = x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
    expected = -sum(log_p[b, i, text[b, i]] for b, i in np.argwhere(chosen))
    np.testing.assert_allclose(loss.total, expected, rtol=1e-5)
    assert loss.weight == chosen.sum() > 0
    hits, weight = loss.metrics[f"{name}/accuracy"]
    best = x.argmax(axis=-1) == text
    np.testing.assert_allclose(hits / weight, best[chosen].mean())
    blind, weight = loss.metrics[f"{name}/unigram_accuracy"]
    frequent = np.bincount(text[maskable]).max() / maskable.sum()
    in_sight, hidden = (seen == text)[chosen].sum(), (seen == MASK)[chosen].sum()
    expected = (in_sight + frequent * hidden) / chosen.sum()
    np.testing.assert_allclose(blind / weight, expected, rtol=1e-6)


def test_a_batch_without_words_costs_nothing():
    text, mask = texts(3)
    loss, _ = run(text, mask, np.zeros(3, bool), np.zeros((*text.shape, WORDS), np.float32))
    assert loss.total == 0
    assert loss.weight == 0


def test_the_gradient_is_probability_less_target():
    rng = np.random.default_rng(0)
    logits = jnp.array(rng.normal(size=(2, 3, 7)), jnp.float32)
    text = jnp.array(rng.integers(0, 7, (2, 3)))
    gradient = jax.grad(lambda x: word_loss(x, text).sum())(logits)
    expected = jax.nn.softmax(logits) - jax.nn.one_hot(text, 7)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
    assert word_loss(logits.astype(jnp.bfloat16), text).dtype == jnp.float32
