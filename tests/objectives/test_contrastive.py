"""Image-text contrastive learning."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.objectives.contrastive import contrastive_objective, info_nce
from mmjax.objectives.loss import Features


def features(image, text, image_id, valid, scale=10.0):
    """Embeddings as an encoder would leave them."""
    given = object.__new__(Features)
    given.model = SimpleNamespace(contrastive=SimpleNamespace(scale=jnp.asarray(scale)))
    given.batch = {"image_id": jnp.asarray(image_id), "valid": jnp.asarray(valid)}
    given.__dict__.update(image_embedding=jnp.asarray(image), text_embedding=jnp.asarray(text))
    return given


def embeddings(rows, width, seed=0):
    x = np.random.default_rng(seed).normal(size=(2, rows, width))
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def expected_loss(image, text, image_id, valid, scale):
    """The mean over valid rows, written with loops over the rows that count."""
    rows = np.flatnonzero(valid)
    total = 0.0
    for a, b in ((image, text), (text, image)):
        for i in rows:
            logits = np.array([scale * a[i].astype(np.float64) @ b[j] for j in rows])
            log_p = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
            same = [k for k, j in enumerate(rows) if image_id[i] == image_id[j]]
            total -= log_p[same].mean() / 2
    return total / len(rows)


CASES = {
    "all_different": (8, 5, range(8), [True] * 8),
    "padding": (6, 3, range(6), [True, True, False, True, False, True]),
    "captions_of_one_picture": (7, 4, [5, 5, 1, 2, 5, 2, 9], [True] * 7),
    "both": (7, 4, [5, 5, 1, 2, 5, 2, 9], [True, False, True, True, True, True, False]),
    "one_row": (1, 4, [3], [True]),
}


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_papers(case, scale):
    rows, width, image_id, valid = CASES[case]
    image_id, valid = np.array(image_id), np.array(valid)
    image, text = embeddings(rows, width)
    loss = contrastive_objective(features(image, text, image_id, valid, scale), jax.random.key(0))
    assert loss.weight == valid.sum()
    expected = expected_loss(image, text, image_id, valid, scale)
    np.testing.assert_allclose(loss.total / loss.weight, expected, rtol=1e-4, atol=1e-5)


def test_what_padding_holds_does_not_matter():
    rows, width, image_id, valid = CASES["padding"]
    image, text = embeddings(rows, width)
    invalid = ~np.array(valid)

    def loss(image, text, image_id):
        loss = contrastive_objective(features(image, text, image_id, valid), jax.random.key(0))
        return loss.total, loss

    first, _ = loss(image, text, np.array(image_id))
    # An invalid row may even repeat a picture's number.
    other = np.where(invalid, 0, image_id)
    gradient, seen = jax.grad(loss, has_aux=True)(jnp.where(invalid[:, None], 9.0, image), text,
                                                  other)  # fmt: skip
    np.testing.assert_allclose(seen.total, first, rtol=1e-5)
    assert np.isfinite(gradient).all()
    assert not gradient[invalid].any()


def test_accuracy_counts_any_caption_of_the_picture():
    text = np.eye(4, dtype=np.float32)
    image = text[[1, 0, 3, 2]]  # each picture is nearest to its neighbour's caption
    for image_id, accuracy in (([7, 7, 8, 9], 0.5), ([7, 7, 9, 9], 1.0), (range(4), 0.0)):
        loss = contrastive_objective(
            features(image, text, np.array(image_id), [True] * 4), jax.random.key(0)
        )
        total, weight = loss.metrics["contrastive/accuracy"]
        assert total / weight == accuracy


def test_uniform_scores_cost_the_logarithm_of_the_candidates():
    logits = jnp.zeros((6, 6))
    loss = info_nce(logits, jnp.eye(6, dtype=bool), jnp.arange(6) < 4)
    np.testing.assert_allclose(loss[:4], np.log(4), rtol=1e-6)


def test_the_gradient_is_probability_less_target():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, 5)).astype(np.float32)
    image_id, valid = np.array([1, 1, 2, 3, 4]), np.array([True, True, True, True, False])
    positives = image_id[:, None] == image_id
    gradient = jax.grad(
        lambda x: info_nce(x, jnp.asarray(positives), jnp.asarray(valid))[:4].sum()
    )(jnp.asarray(logits))
    p = np.exp(logits[:4, :4].astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    target = positives[:4, :4] / positives[:4, :4].sum(axis=1, keepdims=True)
    np.testing.assert_allclose(gradient[:4, :4], p - target, atol=1e-6)
    assert not gradient[:, 4].any()
