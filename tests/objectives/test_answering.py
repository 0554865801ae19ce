"""Visual question answering as classification."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.objectives import Features
from mmjax.objectives.answering import Answering, AnswerLabels, soft_binary_cross_entropy
from tests.objectives.fakes import FakeModel, batch_of
from tests.objectives.region_models import batch, features


def run(logits, targets, valid, objective=None, key=0, **fields):
    model = FakeModel(score_answers=lambda fused: jnp.array(logits))
    vectors = jnp.zeros((len(valid), 1))
    given = batch_of(len(valid), image=vectors, text=vectors, answer=targets, valid=valid, **fields)
    return (objective or Answering())(Features(model, given), jax.random.key(key))


@pytest.mark.parametrize(("rows", "answers"), [(5, 7), (1, 3), (8, 1)])
def test_agrees_with_plain_binary_cross_entropy(rows, answers):
    rng = np.random.default_rng(0)
    logits = (3 * rng.normal(size=(rows, answers))).astype(np.float32)
    targets = rng.choice([0, 0.3, 0.6, 0.9, 1], (rows, answers)).astype(np.float32)
    valid = np.arange(rows) != 2
    loss = run(logits, targets, valid)
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    expected = -(targets * np.log(p) + (1 - targets) * np.log(1 - p))
    np.testing.assert_allclose(loss.total, expected[valid].sum(), rtol=1e-5)
    assert loss.weight == valid.sum()
    score, weight = loss.metrics["answering/accuracy"]
    best = targets[np.arange(rows), logits.argmax(axis=1)]
    np.testing.assert_allclose(score / weight, best[valid].mean(), rtol=1e-6)


def test_large_scores_stay_finite():
    loss = soft_binary_cross_entropy(jnp.array([[300.0, -300.0]]), jnp.array([[0.0, 1.0]]))
    np.testing.assert_allclose(loss, 600)


def test_the_gradient_is_probability_less_target():
    rng = np.random.default_rng(1)
    logits = jnp.array(rng.normal(size=(3, 4)), jnp.float32)
    targets = jnp.array(rng.random((3, 4)), jnp.float32)
    gradient = jax.grad(lambda x: soft_binary_cross_entropy(x, targets).sum())(logits)
    np.testing.assert_allclose(gradient, jax.nn.sigmoid(logits) - targets, atol=1e-6)


# ---- one label of each question

SCORES = np.array([[0, 0.9, 0.3], [0, 0, 0], [1, 0, 0], [0.3, 0.3, 0.6]], np.float32)
VALID = np.array([True, True, False, True])


def name_one(logits, scores=SCORES, valid=VALID, **options):
    return run(logits, scores, valid, AnswerLabels(), **options)


def test_an_answer_is_drawn_by_its_share():
    """The gradient, probability less target, tells which one."""
    rows = 2500
    scores, valid = np.tile(SCORES[3], (rows, 1)), np.ones(rows, bool)

    def total(logits):
        return name_one(logits, scores, valid).total

    targets = 1 / 3 - np.asarray(jax.grad(total)(jnp.zeros((rows, 3))))
    drawn = targets.argmax(axis=1)
    np.testing.assert_allclose(targets, np.eye(3)[drawn], atol=1e-6)
    shares = np.bincount(drawn, minlength=3) / rows
    np.testing.assert_allclose(shares, [0.25, 0.25, 0.5], atol=5 * 0.5 / 50)


def test_rows_without_an_answer_do_not_count():
    logits = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    loss = name_one(logits)
    assert loss.weight == 2
    score, weight = loss.metrics["answer_labels/accuracy"]
    best = SCORES[np.arange(4), logits.argmax(axis=1)]
    np.testing.assert_allclose((score, weight), (best[[0, 3]].sum(), 2), rtol=1e-6)
    np.testing.assert_array_equal(loss.scores[1], [1, 0, 0, 1])
    gradient = jax.grad(lambda x: name_one(x).total)(jnp.array(logits))
    assert np.isfinite(gradient).all()
    assert gradient[np.array([0, 3])].any(axis=1).all()
    assert not gradient[np.array([1, 2])].any()
    nothing = name_one(logits, valid=np.zeros(4, bool))
    assert (nothing.total, nothing.weight) == (0, 0)


def test_what_is_drawn_belongs_to_examples_not_to_rows():
    logits = np.tile(np.random.default_rng(0).normal(size=3), (4, 1)).astype(np.float32)
    order = np.array([3, 0, 2, 1])
    index = np.array([7, 8, 9, 10])
    for seed in range(5):
        straight = name_one(logits, index=index, key=seed)
        permuted = name_one(logits, SCORES[order], VALID[order], index=index[order], key=seed)
        np.testing.assert_allclose(permuted.total, straight.total, rtol=1e-6)


def test_of_a_model():
    given = batch()
    given["answer"] = np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 1, 2]]
    given["answer"][4] = 0
    seen = features("lxmert", given)
    inputs = ("text", "text_mask", "regions", "boxes", "region_mask")
    out = seen.model(**{name: given[name] for name in inputs})["question_answering_score"]
    x = np.asarray(out, np.float64)
    p = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
    loss = AnswerLabels()(seen, jax.random.key(0))
    counted = given["valid"] & (given["answer"].sum(axis=1) > 0)
    expected = -np.log((p * given["answer"]).sum(axis=1)[counted]).sum()
    np.testing.assert_allclose(loss.total, expected, rtol=1e-5)
    assert loss.weight == counted.sum() == 4
