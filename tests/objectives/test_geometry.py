"""Rank, uniformity and alignment of embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.objectives.geometry import (
    SAMPLE,
    alignment,
    effective_rank,
    geometry_metrics,
    uniformity,
)
from tests.models.reference import assert_close
from tests.objectives.fakes import unit_vectors


def rank_of(vectors):
    """Roy and Vetterli 2007, by a singular value decomposition in float64."""
    singular = np.linalg.svd(vectors.astype(np.float64), compute_uv=False)
    shares = singular[singular > 1e-9] / singular.sum()
    return np.exp(-(shares * np.log(shares)).sum())


def cone(rows, width, spread):
    """Vectors around one direction, as those of a model that is about to collapse."""
    x = unit_vectors(1, width) + spread * unit_vectors(rows, width, seed=1)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


VECTORS = {
    "wide": unit_vectors(12, 40),
    "tall": unit_vectors(40, 12),
    "cone": cone(30, 16, 0.05),
    "of_rank_3": (lambda x: x / np.linalg.norm(x, axis=1, keepdims=True))(
        unit_vectors(20, 3) @ unit_vectors(3, 16, seed=1)
    ),
    "alone": unit_vectors(1, 8),
}


@pytest.mark.parametrize("name", VECTORS)
def test_the_rank_agrees_with_the_singular_values(name):
    vectors = VECTORS[name]
    found = effective_rank(jnp.array(vectors), jnp.ones(len(vectors), bool))
    np.testing.assert_allclose(found, rank_of(vectors) / min(vectors.shape), rtol=2e-4)


def test_the_rank_goes_from_one_line_to_all_directions():
    every = effective_rank(jnp.eye(8)[:, [3, 1, 2, 0, 4, 7, 5, 6]], jnp.ones(8, bool))
    np.testing.assert_allclose(every, 1, rtol=1e-5)
    line = jnp.array(np.repeat(unit_vectors(1, 8), 20, axis=0))
    np.testing.assert_allclose(effective_rank(line, jnp.ones(20, bool)), 1 / 8, rtol=1e-5)


def test_uniformity_agrees_with_the_paper():
    vectors = unit_vectors(9, 5)
    pairs = np.random.default_rng(0).random((9, 9)) < 0.5
    kernel = [
        np.exp(-2 * np.square(vectors[i].astype(np.float64) - vectors[j]).sum())
        for i, j in np.argwhere(pairs)
    ]
    found = uniformity(jnp.array(vectors), jnp.array(pairs))
    np.testing.assert_allclose(found, np.log(np.mean(kernel)), rtol=1e-5)


def test_uniformity_goes_from_one_vector_to_the_sphere():
    pairs = ~jnp.eye(100, dtype=bool)
    same = jnp.array(np.repeat(unit_vectors(1, 8), 100, axis=0))
    np.testing.assert_allclose(uniformity(same, pairs), 0, atol=1e-5)
    spread = jnp.array(unit_vectors(100, 2000))
    np.testing.assert_allclose(uniformity(spread, pairs), -4, atol=0.02)


def test_alignment_agrees_with_the_paper():
    images, texts = map(jnp.asarray, (unit_vectors(6, 5), unit_vectors(6, 5, seed=1)))
    expected = np.linalg.norm(np.asarray(images, np.float64) - texts, axis=1) ** 2
    np.testing.assert_allclose(alignment(images, texts), expected, rtol=1e-5)
    np.testing.assert_allclose(alignment(images, images), 0)


def measures(images, texts, valid, image_id):
    arguments = map(jnp.asarray, (images, texts, valid, image_id))
    return jax.device_get(geometry_metrics(*arguments))


def means(metrics):
    return {name: total / weight for name, (total, weight) in metrics.items()}


def test_one_modality_that_collapses_is_enough():
    valid, number = np.ones(20, bool), np.arange(20)
    spread, collapsed = unit_vectors(20, 8), cone(20, 8, 0.01)
    both = means(measures(spread, unit_vectors(20, 8, seed=2), valid, number))
    for images, texts in ((spread, collapsed), (collapsed, spread)):
        found = means(measures(images, texts, valid, number))
        assert found["embeddings/effective_rank"] < 0.25 < both["embeddings/effective_rank"]
        assert both["embeddings/uniformity"] < -2 < found["embeddings/uniformity"]


def test_invalid_rows_and_captions_of_one_picture_do_not_count():
    images, texts = unit_vectors(12, 8), unit_vectors(12, 8, seed=1)
    valid = np.arange(12) % 4 != 2
    number = np.array([3, 3, 3, 0, 1, 2, 9, 9, 8, 8, 8, 7])
    found = measures(images, texts, valid, number)
    kept = number[valid]
    rank = min(rank_of(images[valid]), rank_of(texts[valid])) / 8
    expected = {
        "embeddings/effective_rank": (9 * rank, 9),
        "embeddings/alignment": (np.square(images[valid] - texts[valid]).sum(), 9),
        "embeddings/uniformity": max(
            _uniformity(x[valid], kept[:, None] != kept) for x in (images, texts)
        ),
    }
    assert_close(found, expected)
    again = measures(np.where(valid[:, None], images, np.nan), texts, valid, number)
    assert not np.isnan(again["embeddings/effective_rank"][0])


def _uniformity(vectors, pairs):
    squares = np.square(vectors[:, None].astype(np.float64) - vectors).sum(axis=-1)
    return np.log(np.exp(-2 * squares)[pairs].mean()) * pairs.sum(), pairs.sum()


def test_a_sample_stands_for_a_large_batch():
    rows = SAMPLE + 50
    images, texts = unit_vectors(rows, 8), unit_vectors(rows, 8, seed=1)
    whole = measures(images, texts, np.ones(rows, bool), np.arange(rows))
    sample = measures(images[:SAMPLE], texts[:SAMPLE], np.ones(SAMPLE, bool), np.arange(SAMPLE))
    for name in ("embeddings/effective_rank", "embeddings/uniformity"):
        assert whole[name] == sample[name]
    assert whole["embeddings/alignment"][1] == rows


def test_a_batch_without_rows_has_no_weight():
    images = unit_vectors(4, 3)
    for total, weight in measures(images, images, np.zeros(4, bool), range(4)).values():
        assert total == weight == 0
    one_picture = measures(images, images, np.ones(4, bool), np.zeros(4, int))
    assert one_picture["embeddings/uniformity"] == (0, 0)


def test_measuring_leaves_no_gradient():
    def total(images):
        valid, number = jnp.ones(6, bool), jnp.arange(6)
        return sum(
            total for total, _ in geometry_metrics(images, images[::-1], valid, number).values()
        )

    assert not jax.grad(total)(jnp.array(unit_vectors(6, 4))).any()
