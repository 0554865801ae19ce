"""Image-text matching and its hard negatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.errors import InputError
from mmjax.objectives import Features
from mmjax.objectives.folds import pair_gumbel
from mmjax.objectives.matching import (
    Matching,
    matching_loss,
)
from tests.objectives.fakes import FakeModel, batch_of

ROWS = 7
IMAGE_ID = np.array([5, 5, 1, 2, 5, 2, 9])
VALID = np.array([True, True, True, False, True, True, True])
INDEX = np.array([40, 41, 10, 20, 42, 21, 90])


class NumberedModel(FakeModel):
    """Of pictures and texts that are their own numbers.

    `scores[i, j]` is the similarity of picture i and text j; `answer(picture numbers, text
    numbers)` is the matching head.
    """

    def __init__(self, scores=None, answer=None, **parts):
        super().__init__(scale=1.0, **parts)
        self.scores, self.answer = scores, answer

    def embed_image(self, image):
        return jnp.eye(ROWS)[image.pooled[:, 0].astype(int)]

    def embed_text(self, text):
        scores = jnp.zeros((ROWS, ROWS)) if self.scores is None else jnp.array(self.scores)
        return scores.T[text.pooled[:, 0].astype(int)]

    def match(self, fused):
        image, text = np.asarray(fused.pooled).astype(int).T
        return jnp.zeros((len(image), 2)) if self.answer is None else self.answer(image, text)


def features(model, image_id=IMAGE_ID, valid=VALID, order=None):
    """The batch, its rows in some `order`."""
    order = np.arange(ROWS) if order is None else order
    batch = batch_of(ROWS, image_id=image_id[order], valid=valid[order], index=INDEX[order])
    numbers = jnp.array(order, jnp.float32)[:, None]
    return Features(model, batch | {"image": numbers, "text": numbers})


def pairs(key, negatives="hard", scores=None, order=None, smoothing=0.0):
    """The (picture, text) pairs of valid rows that are asked about, [n, 2], and the loss."""
    seen = []

    def record(image, text):
        seen.append(np.stack([image, text], axis=1))
        return jnp.zeros((len(image), 2))

    given = features(NumberedModel(scores, record), order=order)
    loss = Matching(negatives=negatives, smoothing=smoothing)(given, key)
    asked = seen[0]
    assert len(asked) == 3 * ROWS
    return asked[VALID[asked].all(axis=1)], loss


@pytest.mark.parametrize("negatives", ["hard", "random"])
def test_negatives_are_other_pictures_and_valid(negatives):
    scores = 5 * np.random.default_rng(0).normal(size=(ROWS, ROWS)).astype(np.float32)
    valid_rows = np.flatnonzero(VALID)
    for seed in range(10):
        asked, loss = pairs(jax.random.key(seed), negatives, scores=scores)
        # Nothing was asked of an invalid row that counts, so no valid row drew one.
        assert loss.weight == len(asked) == 3 * VALID.sum()
        own = asked[:, 0] == asked[:, 1]
        np.testing.assert_array_equal(np.sort(asked[own, 0]), valid_rows)
        false = asked[~own]
        assert (IMAGE_ID[false[:, 0]] != IMAGE_ID[false[:, 1]]).all()
        # Every picture has a false text, and every text a false picture.
        np.testing.assert_array_equal(np.unique(false[:, 0]), valid_rows)
        np.testing.assert_array_equal(np.unique(false[:, 1]), valid_rows)


def test_hard_negatives_are_the_similar_ones():
    scores = np.zeros((ROWS, ROWS), np.float32)
    scores[0, 2] = scores[6, 1] = 50.0
    asked, _ = pairs(jax.random.key(0), scores=scores)
    asked = {tuple(pair) for pair in asked}
    assert (0, 2) in asked
    assert (6, 1) in asked


def test_a_constant_answer_costs_the_class_prior():
    def answer(image, text):
        return jnp.tile(jnp.log(jnp.array([2 / 3, 1 / 3])), (len(image), 1))

    loss = Matching()(features(NumberedModel(answer=answer)), jax.random.key(0))
    np.testing.assert_allclose(loss.total / loss.weight, 0.6365, atol=5e-5)
    total, weight = loss.metrics["matching/positives"]
    np.testing.assert_allclose(total / weight, 1 / 3)


def test_agrees_with_plain_cross_entropy():
    logits = np.random.default_rng(3).normal(size=(ROWS, ROWS, 2)).astype(np.float32)
    model = NumberedModel(answer=lambda image, text: jnp.array(logits[image, text]))
    loss = Matching()(features(model), jax.random.key(0))
    asked, _ = pairs(jax.random.key(0))
    x = logits[asked[:, 0], asked[:, 1]].astype(np.float64)
    log_p = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    true = asked[:, 0] == asked[:, 1]
    np.testing.assert_allclose(
        loss.total, -np.where(true, log_p[:, 1], log_p[:, 0]).sum(), rtol=1e-5
    )
    assert loss.weight == len(asked)
    hits, weight = loss.metrics["matching/accuracy"]
    np.testing.assert_allclose(hits / weight, ((x[:, 1] > x[:, 0]) == true).mean())


def test_a_batch_of_one_picture_has_no_negatives():
    loss = Matching()(features(NumberedModel(), image_id=np.full(ROWS, 3)), jax.random.key(0))
    assert loss.weight == VALID.sum()
    assert np.isfinite(loss.total)
    nothing = Matching()(features(NumberedModel(), valid=np.zeros(ROWS, bool)), jax.random.key(0))
    assert nothing.weight == 0
    assert nothing.total == 0


def test_negatives_belong_to_examples_not_to_rows():
    """The same examples in another order have the same false partners."""
    scores = np.random.default_rng(1).normal(size=(ROWS, ROWS)).astype(np.float32)
    order = np.random.default_rng(2).permutation(ROWS)
    key = jax.random.key(11)
    straight, _ = pairs(key, scores=scores)
    permuted, _ = pairs(key, scores=scores, order=order)
    np.testing.assert_array_equal(
        straight[np.lexsort(straight.T)], permuted[np.lexsort(permuted.T)]
    )


def test_the_noise_of_a_pair_is_gumbel_and_its_own():
    noise = np.asarray(pair_gumbel(jax.random.key(0), jnp.arange(300), jnp.arange(400)))
    np.testing.assert_allclose(noise.mean(), 0.5772, atol=0.02)
    np.testing.assert_allclose(noise.var(), np.pi**2 / 6, atol=0.04)
    assert abs(np.corrcoef(noise[:, :300].ravel(), noise[:, :300].T.ravel())[0, 1]) < 0.02
    picked = pair_gumbel(jax.random.key(0), jnp.array([17]), jnp.array([230, 31]))
    np.testing.assert_array_equal(picked, noise[17:18, [230, 31]])
    other = np.asarray(pair_gumbel(jax.random.key(1), jnp.arange(300), jnp.arange(400)))
    assert abs(np.corrcoef(noise.ravel(), other.ravel())[0, 1]) < 0.02


@pytest.mark.parametrize("bits", [0, 1, 2**31, 2**32 - 256, 2**32 - 1])
def test_the_noise_is_finite_for_any_bits(bits, monkeypatch):
    monkeypatch.setattr(
        jax.random,
        "key_data",
        lambda key: jnp.full(2, bits, jnp.uint32),
    )
    noise = pair_gumbel(jax.random.key(0), jnp.arange(2), jnp.arange(2))
    assert np.isfinite(noise).all()


def test_no_gradient_flows_through_the_draw():
    """Were there a path, the head's answer would hand a gradient to the scores."""

    def loss(scores):
        model = NumberedModel(scores)
        model.contrastive.scale, model.match = scores.sum(), lambda fused: fused.pooled
        return Matching()(features(model), jax.random.key(0)).total

    gradient = jax.grad(loss)(jnp.array(np.random.default_rng(0).normal(size=(ROWS, ROWS))))
    assert not np.asarray(gradient).any()


def test_the_gradient_of_the_scores():
    logits = jnp.array(np.random.default_rng(0).normal(size=(4, 2)), jnp.float32)
    labels = jnp.array([True, False, True, False])
    gradient = jax.grad(lambda x: matching_loss(x, labels).sum())(logits)
    target = np.stack([~np.asarray(labels), np.asarray(labels)], axis=1)
    np.testing.assert_allclose(gradient, jax.nn.softmax(logits) - target, atol=1e-6)


def test_all_drawn_evenly_is_random():
    scores = 5 * np.random.default_rng(0).normal(size=(ROWS, ROWS)).astype(np.float32)
    key = jax.random.key(3)
    hard, _ = pairs(key, scores=scores)
    even, _ = pairs(key, scores=scores, smoothing=1.0)
    random, _ = pairs(key, "random")
    np.testing.assert_array_equal(even, random)
    assert (hard != even).any()


@pytest.mark.parametrize("smoothing", [-0.1, 1.5])
def test_a_share_is_a_share(smoothing):
    model = NumberedModel()
    model.matching = object()
    with pytest.raises(InputError, match=f"matching.smoothing is {smoothing}"):
        Matching(smoothing=smoothing).check("matching", model)
