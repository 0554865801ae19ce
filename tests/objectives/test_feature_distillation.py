"""Learning where a teacher puts and how it looks: each distance in plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.attention_maps import SelfAttention
from mmjax.objectives.feature_distillation import (
    attention_divergence,
    relation_distance,
    squared_distance,
)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def in_float32(*arrays):
    return [jnp.array(x, jnp.float32) for x in arrays]


def test_squared_distance_of_directions():
    student, teacher = draw(5, 8), 3 * draw(5, 8, seed=1)
    units = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (student, teacher)]
    found = squared_distance(*in_float32(student, teacher))
    np.testing.assert_allclose(found, np.square(units[0] - units[1]).sum(axis=1), rtol=1e-5)
    np.testing.assert_allclose(squared_distance(*in_float32(teacher, 5 * teacher)), 0, atol=1e-6)


def test_relation_distance_of_spaces_of_any_width():
    """Row by row: the valid ones' Gram matrix, its rows of unit length, 1/B² of the squares."""
    student, teacher = draw(6, 8), draw(6, 3, seed=1)
    valid = np.array([True, True, False, True, True, False])
    found = relation_distance(*in_float32(student, teacher), jnp.array(valid))
    grams = []
    for x in (student[valid], teacher[valid]):
        gram = np.array([[a @ b for b in x] for a in x])
        grams.append(gram / np.sqrt(np.square(gram).sum(axis=1))[:, None])
    expected = np.square(grams[0] - grams[1]).sum() / 4**2
    np.testing.assert_allclose(np.mean(found[valid]), expected, rtol=1e-5)
    turned = student @ np.linalg.qr(draw(8, 8, seed=2))[0]  # lies as before, elsewhere
    same = relation_distance(*in_float32(student, turned), jnp.array(valid))
    np.testing.assert_allclose(same[valid], 0, atol=1e-6)


def attention_of(heads, seed, mask):
    scores = draw(3, heads, 5, 5, seed=seed)
    return SelfAttention(jnp.array(scores, jnp.float32), None if mask is None else mask)


def probabilities(attention, seen):
    """[tokens, heads, what they see] of one example, its own padding left out."""
    scores = np.asarray(attention, np.float64)[:, seen][:, :, seen]
    p = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    return p.transpose(1, 0, 2)


@pytest.mark.parametrize("heads", [(4, 4), (2, 3)], ids=str)
def test_attention_divergence(heads):
    """Head by head, or their means where their numbers differ; the mean over heads and tokens."""
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], bool)
    student, teacher = (
        attention_of(count, seed, jnp.array(mask)[:, None]) for seed, count in enumerate(heads)
    )
    found = attention_divergence(student, teacher)
    for row, seen in enumerate(mask):
        q, p = (probabilities(x.scores[row], seen) for x in (student, teacher))
        if heads[0] != heads[1]:
            q, p = (x.mean(axis=1, keepdims=True) for x in (q, p))
        expected = (p * np.log(p / q)).sum(axis=-1).mean()
        np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-6)


def test_attention_is_compared_over_what_both_may_look_at():
    """A student that reads from left to right learns the teacher's share of what it has seen."""
    causal = jnp.tril(jnp.ones((1, 5, 5), bool))
    student, teacher = attention_of(2, 0, causal), attention_of(2, 1, None)
    found = attention_divergence(student, teacher)
    for row in range(3):
        of_tokens = []
        for token in range(5):
            q, p = (np.exp(x.scores[row, :, token, : token + 1]) for x in (student, teacher))
            q, p = (x / x.sum(axis=-1, keepdims=True) for x in (q, p))
            of_tokens.append((p * np.log(p / q)).sum(axis=-1).mean())
        np.testing.assert_allclose(found[row], np.mean(of_tokens), rtol=1e-4)


def test_the_gradient_of_attention_is_student_less_teacher():
    mask = jnp.array([[1, 1, 1, 1, 0]], bool)[:, None].repeat(3, axis=0)
    student, teacher = attention_of(2, 0, mask), attention_of(2, 1, mask)
    slopes = jax.grad(
        lambda s, t: attention_divergence(SelfAttention(s, mask), SelfAttention(t, mask)).sum(),
        argnums=(0, 1),
    )(student.scores, teacher.scores)
    expected = np.zeros((3, 2, 5, 5))
    for row in range(3):
        q, p = (probabilities(x.scores[row], np.arange(5) < 4) for x in (student, teacher))
        expected[row, :, :4, :4] = (q - p).transpose(1, 0, 2) / (2 * 4)
    np.testing.assert_allclose(slopes[0], expected, atol=1e-6)
    assert not np.asarray(slopes[1]).any()
