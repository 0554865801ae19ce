"""Fine-tuning for retrieval. `tests/weights/families` holds it against METER, ViLT and UNITER."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from mmjax.errors import InputError
from mmjax.objectives import Features
from mmjax.objectives.ranking import (
    MarginRanking,
    Ranking,
    draw_partners,
    margin_loss,
    ranking_loss,
)
from mmjax.sharding import to_device
from tests.objectives.fakes import FakeModel, batch_of

ROWS = 8
IMAGE_ID = np.array([5, 5, 1, 2, 5, 2, 9, 3])
VALID = np.array([True, True, True, False, True, True, True, True])
INDEX = np.array([40, 41, 10, 20, 42, 21, 90, 3])
SCORES = np.random.default_rng(0).normal(size=(ROWS, ROWS)).astype(np.float32)
KEY = jax.random.key(3)


class NumberedModel(FakeModel):
    """Of pictures and texts that are their own numbers; the score of a pair is in a table."""

    def __init__(self):
        super().__init__(ranking=object())
        self.asked = []

    def rank(self, fused):
        image, text = fused.pooled.astype(int).T
        self.asked.append((image, text))
        return jnp.array(SCORES)[image, text]


def batch(order=None, image_id=IMAGE_ID, valid=VALID):
    order = np.arange(ROWS) if order is None else order
    given = batch_of(len(order), image_id=image_id[order], valid=valid[order], index=INDEX[order])
    numbers = jnp.array(order, jnp.float32)[:, None]
    return given | {"image": numbers, "text": numbers}


def run(objective, **given):
    """The loss, and the pairs that it asked about, a row for each example, in numbers."""
    model, fields = NumberedModel(), batch(**given)
    loss = objective(Features(model, fields), KEY)
    rows = len(fields["valid"])
    return loss, np.stack([np.asarray(side).reshape(rows, -1) for side in model.asked[0]], axis=-1)


def is_false(pairs):
    """Both sides are valid, and of different pictures."""
    image, text = pairs[..., 0], pairs[..., 1]
    return (IMAGE_ID[image] != IMAGE_ID[text]) & VALID[image] & VALID[text]


def test_partners_are_different_and_allowed_and_any_is_as_likely():
    rng = np.random.default_rng(0)
    allowed = np.array([[0, 1, 1, 1, 1], [1, 0, 0, 0, 1], [0, 0, 0, 0, 0]], bool)
    noise = jnp.array(rng.gumbel(size=(4000, 3, 5)), jnp.float32)
    found, counts = jax.vmap(lambda noise: draw_partners(noise, jnp.array(allowed), 3))(noise)
    found = np.asarray(found)
    assert (np.sort(found)[..., 1:] != np.sort(found)[..., :-1]).all()
    np.testing.assert_array_equal(counts[0].sum(axis=1), [3, 2, 0])
    np.testing.assert_array_equal(counts, np.broadcast_to(counts[0], counts.shape))
    assert set(found[:, 1, :2].ravel()) == {0, 4}
    shares = (found[:, 0, :, None] == np.arange(5)).any(axis=1).mean(axis=0)
    np.testing.assert_allclose(shares, [0, 0.75, 0.75, 0.75, 0.75], atol=0.03)


def test_the_true_pair_against_those_that_count():
    rng = np.random.default_rng(1)
    true, false = rng.normal(size=4), rng.normal(size=(4, 3))
    counts = np.array([[1, 1, 1], [1, 0, 1], [0, 0, 0], [0, 1, 0]], bool)
    expected = [
        np.log(np.exp(z) + np.exp(others[kept]).sum()) - z
        for z, others, kept in zip(true, false, counts, strict=True)
    ]
    arrays = map(jnp.asarray, (np.float32(true), np.float32(false), counts))
    np.testing.assert_allclose(ranking_loss(*arrays), expected, rtol=1e-5, atol=1e-6)


def test_margins_of_sigmoids():
    true, false = np.array([2.0, -1.0]), np.array([[2.0, -3.0], [-1.0, 0.5]])

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    expected = np.maximum(0.2 + sigmoid(false) - sigmoid(true)[:, None], 0)
    assert expected[0, 1] == 0
    found = margin_loss(jnp.array(true, jnp.float32), jnp.array(false, jnp.float32), 0.2)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_texts_of_other_pictures():
    loss, pairs = run(Ranking(false_texts=3))
    assert pairs.shape == (ROWS, 4, 2)
    np.testing.assert_array_equal(pairs[..., 0], np.arange(ROWS)[:, None] + np.zeros((1, 4)))
    np.testing.assert_array_equal(pairs[:, 0, 1], np.arange(ROWS))
    # Every picture but the invalid one has at least three texts of others.
    assert is_false(pairs[VALID, 1:]).all()
    assert all(len(set(row)) == 4 for row in pairs[..., 1])
    z = SCORES[pairs[..., 0], pairs[..., 1]].astype(np.float64)[VALID]
    expected = np.log(np.exp(z).sum(axis=1)) - z[:, 0]
    np.testing.assert_allclose(loss.total, expected.sum(), rtol=1e-5)
    assert loss.weight == VALID.sum()
    hits, weight = loss.metrics["ranking/accuracy"]
    assert (hits, weight) == ((z.argmax(axis=1) == 0).sum(), VALID.sum())


def test_as_many_texts_as_there_are():
    """More than the batch has: all of them, and each picture those that are not its own."""
    loss, pairs = run(Ranking(false_texts=15))
    assert pairs.shape == (ROWS, ROWS, 2)
    total = 0
    for row in pairs[VALID]:
        kept = is_false(row)
        kept[0] = True
        z = SCORES[row[kept, 0], row[kept, 1]].astype(np.float64)
        total += np.log(np.exp(z).sum()) - z[0]
    np.testing.assert_allclose(loss.total, total, rtol=1e-5)
    scores, weights = loss.scores
    np.testing.assert_array_equal(weights, VALID)
    np.testing.assert_array_equal((scores > -1e29)[VALID, 1:], is_false(pairs[VALID, 1:]))


def test_either_side_may_be_false():
    loss, pairs = run(MarginRanking(false_texts=2, false_images=1))
    assert pairs.shape == (ROWS, 4, 2)
    own = np.arange(ROWS)
    for column, side in ((1, 0), (2, 0), (3, 1)):
        np.testing.assert_array_equal(pairs[:, column, side], own)
    counts = is_false(pairs[:, 1:])
    assert counts[VALID].all()
    p = 1 / (1 + np.exp(-SCORES[pairs[..., 0], pairs[..., 1]].astype(np.float64)))
    expected = np.maximum(0.2 + p[:, 1:] - p[:, :1], 0)[counts]
    np.testing.assert_allclose(loss.total, expected.sum(), rtol=1e-5)
    assert loss.weight == counts.sum() == 3 * VALID.sum()
    np.testing.assert_array_equal(loss.scores[1], counts.sum(axis=1))
    hits, weight = loss.metrics["margin_ranking/accuracy"]
    assert (hits, weight) == ((p[:, 1:] < p[:, :1])[counts].sum(), counts.sum())


@pytest.mark.parametrize("objective", [Ranking(false_texts=2), MarginRanking()])
def test_what_is_drawn_belongs_to_the_examples(objective):
    """Not to their rows, nor to what fills up the batch."""
    loss, pairs = run(objective)
    for order in (np.random.default_rng(2).permutation(ROWS), np.flatnonzero(VALID)):
        other, again = run(objective, order=order)
        counts = VALID[order]
        np.testing.assert_array_equal(again[counts], pairs[order[counts]])
        expected = loss.total, loss.weight
        np.testing.assert_allclose((other.total, other.weight), expected, rtol=1e-6)


@pytest.mark.parametrize("objective", [Ranking(), MarginRanking()])
def test_without_other_pictures_nothing_counts(objective):
    for given in ({"image_id": np.full(ROWS, 3)}, {"valid": np.zeros(ROWS, bool)}):
        loss, _ = run(objective, **given)
        assert loss.weight == loss.total == 0


def test_a_model_without_the_head_is_refused():
    model = NumberedModel()
    Ranking().check("ranking", model)
    model.ranking = None
    with pytest.raises(InputError, match=r"objectives.ranking needs .* model.ranking"):
        Ranking().check("ranking", model)


class LinearModel(FakeModel):
    """The score of a pair is the product of its vectors."""

    def rank(self, fused):
        image, text = jnp.split(fused.pooled, 2, axis=1)
        return (image * text).sum(axis=1)


@pytest.mark.parametrize("objective", [Ranking(false_texts=3), MarginRanking()])
def test_on_eight_devices_as_on_one(objective):
    rng = np.random.default_rng(4)
    vectors = rng.normal(size=(2, 16, 6)).astype(np.float32)
    fields = {"image_id": np.arange(16) // 2, "valid": np.arange(16) != 5}
    fields |= {"image": vectors[0], "text": vectors[1]}
    given = jax.tree.map(np.asarray, batch_of(16, **fields))

    def mean(image, batch):
        loss = objective(Features(LinearModel(), {**batch, "image": image}), KEY)
        return loss.total / loss.weight

    found = []
    for devices in (1, 8):
        mesh = jax.make_mesh(
            (devices, 1, 1),
            ("data", "fsdp", "tensor"),
            (AxisType.Auto,) * 3,
            devices=jax.devices()[:devices],
        )
        with jax.set_mesh(mesh):
            placed = to_device(given, mesh)
            found.append(jax.device_get(jax.jit(jax.value_and_grad(mean))(placed["image"], placed)))
    (value, gradient), (expected, expected_gradient) = found[1], found[0]
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-7)
    assert np.abs(expected_gradient).max() > 1e-3
    assert not gradient[5].any()
