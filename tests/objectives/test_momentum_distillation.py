"""Soft targets from the moving average, mixed with labels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.objectives.features import Features
from mmjax.objectives.momentum_distillation import MomentumDistilled, ramped, soft_cross_entropy


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize(
    ("step", "ramp_steps", "expected"),
    [(0, 0, 0.4), (9, 0, 0.4), (0, 8, 0.0), (2, 8, 0.1), (8, 8, 0.4), (90, 8, 0.4)],
)
def test_the_share_grows_linearly(step, ramp_steps, expected):
    assert float(ramped(0.4, jnp.array(step), ramp_steps)) == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 6), (1, 1)])
def test_soft_targets_agree_with_the_plain_sum(shape):
    logits, teacher = 3 * np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    expected = -(np.exp(log_softmax(teacher)) * log_softmax(logits)).sum(axis=-1)
    found = soft_cross_entropy(jnp.array(logits), jnp.array(teacher))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_only_the_student_learns():
    """The gradient is that of the Kullback-Leibler divergence: probability less the teacher's."""
    logits, teacher = jnp.array(np.random.default_rng(1).normal(size=(2, 3, 4)), jnp.float32)
    of_logits, of_teacher = jax.grad(lambda *x: soft_cross_entropy(*x).sum(), (0, 1))(
        logits, teacher
    )
    expected = np.exp(log_softmax(logits)) - np.exp(log_softmax(teacher))
    np.testing.assert_allclose(of_logits, expected, atol=1e-6)
    assert not of_teacher.any()


def features(logits, step=None, average=None):
    """Of a model that answers `logits`."""
    given = object.__new__(Features)
    given.model, given.step, given.average = logits, step, average
    return given


def test_the_average_runs_only_where_it_teaches():
    logits = jnp.array([[1.0, 2.0, -1.0], [0.0, 0.5, 3.0]])
    teacher, losses = logits[::-1], jnp.array([0.25, 4.0])
    in_training = features(logits, jnp.array(3), features(teacher))
    runs = []

    def logits_of(features):
        runs.append(features)
        return features.model

    half_way = MomentumDistilled(distill=0.8, ramp_steps=6)
    taught = half_way.distilled(losses, logits, in_training, logits_of)
    assert runs == [in_training.average]
    p = np.exp(log_softmax(teacher))
    expected = 0.6 * losses - 0.4 * (p * log_softmax(logits)).sum(axis=-1)
    np.testing.assert_allclose(taught, expected, rtol=1e-6)
    for objective, given in (
        (MomentumDistilled(), in_training),
        (half_way, features(logits)),
    ):
        alone = objective.distilled(losses, logits, given, logits_of)
        np.testing.assert_array_equal(alone, losses)
    assert len(runs) == 1
    assert half_way.needs_average
    assert not MomentumDistilled().needs_average
