"""Visual question answering as classification, and the choice of objectives by a config."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.data.tokenizer import TextTokenizer
from mmjax.errors import InputError
from mmjax.objectives import build_objectives, total_loss
from mmjax.objectives.answering import answering_objective, soft_binary_cross_entropy
from mmjax.objectives.loss import Features, Loss
from tests.models.reference import tiny_model


def run(logits, targets, valid):
    features = object.__new__(Features)
    features.model = SimpleNamespace(answering=lambda pooled: jnp.asarray(logits))
    features.batch = {"answer": jnp.asarray(targets), "valid": jnp.asarray(valid)}
    features.__dict__["fused"] = SimpleNamespace(pooled=None)
    return answering_objective(features, jax.random.key(0))


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
    logits = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    targets = jnp.asarray(rng.random((3, 4)), jnp.float32)
    gradient = jax.grad(lambda x: soft_binary_cross_entropy(x, targets).sum())(logits)
    np.testing.assert_allclose(gradient, jax.nn.sigmoid(logits) - targets, atol=1e-6)


# ---- which objectives a config asks for

OFF = {
    "contrastive": {"weight": 0.0},
    "matching": {"weight": 0.0, "negatives": "hard"},
    "masked_language": {"weight": 0.0, "rate": 0.15},
    "answering": {"weight": 0.0},
}


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.train(["a red cube", "a blue ball and a cube"], 60)


def test_objectives_with_a_weight_are_built(tokenizer):
    config = {
        **OFF,
        "contrastive": {"weight": 2.0},
        "matching": {"weight": 0.5, "negatives": "hard"},
        "answering": {"weight": 1.0},
    }
    built = build_objectives(config, tiny_model(answers=("yes",)), tokenizer)
    assert [(o.name, o.weight, o.whole_batch) for o in built] == [
        ("contrastive", 2.0, True),
        ("matching", 0.5, True),
        ("answering", 1.0, False),
    ]


@pytest.mark.parametrize(
    ("changes", "model", "words"),
    [
        ({}, {}, "nothing to train"),
        ({"contrastive": {"weight": 1.0}}, {"embedding_width": 0}, "model.embedding_width"),
        (
            {"matching": {"weight": 1.0, "negatives": "hard"}},
            {"embedding_width": 0},
            "model.embedding_width",
        ),
        ({"matching": {"weight": 1.0, "negatives": "hard"}}, {"matching": False}, "model.matching"),
        ({"matching": {"weight": 1.0, "negatives": "hrd"}}, {}, "'hrd'"),
        (
            {"masked_language": {"weight": 1.0, "rate": 0.15}},
            {"masked_language": False},
            "model.masked_language",
        ),
        ({"answering": {"weight": 1.0}}, {}, "model.answers"),
    ],
    ids=str,
)
def test_objectives_that_cannot_be_are_refused(changes, model, words, tokenizer):
    with pytest.raises(InputError) as error:
        build_objectives({**OFF, **changes}, tiny_model(**model), tokenizer)
    assert words in str(error.value)


def test_the_total_is_the_weighted_sum_of_means(tokenizer):
    config = {
        **OFF,
        "contrastive": {"weight": 2.0},
        "masked_language": {"weight": 3.0, "rate": 0.1},
    }
    objectives = build_objectives(config, tiny_model(), tokenizer)
    losses = {
        "contrastive": Loss(jnp.asarray(8.0), jnp.asarray(4.0)),
        "masked_language": Loss(jnp.asarray(6.0), jnp.asarray(12.0)),
    }
    weights = {name: loss.weight for name, loss in losses.items()}
    assert total_loss(objectives, losses, weights) == 2 * 8 / 4 + 3 * 6 / 12
