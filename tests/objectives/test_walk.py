"""The walk over the global batch: every fold against the whole matrix of scores, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mmjax.objectives import walk as walking
from mmjax.objectives.folds import Draw, Hit, InfoNce, Sigmoid, Taught, pair_gumbel
from mmjax.objectives.partners import fetch
from mmjax.objectives.walk import Scale, Side, walk
from mmjax.sharding import BATCH_AXES
from tests.models.reference import assert_close
from tests.objectives.fakes import negative_probabilities, unit_vectors

ROWS, QUEUED, WIDTH = 24, 16, 6
VALID = np.arange(ROWS) % 7 != 3
IMAGE_ID = np.random.default_rng(0).integers(0, 15, ROWS)
QUEUE_ID = np.random.default_rng(1).integers(0, 15, QUEUED)
WAITING = np.arange(QUEUED) < 11
KEY = jax.random.key(3)
FOLDS = (InfoNce(), InfoNce(0.2), Sigmoid(), Taught(), Hit(), Draw(KEY), Draw(KEY, 0.5))


def arguments(seed=0):
    """Scale, rows with a teacher, and candidates of the batch and of a queue."""
    rows, teacher, texts, queue = (
        unit_vectors(ROWS, WIDTH, seed=seed),
        unit_vectors(ROWS, WIDTH, seed=seed + 1),
        unit_vectors(ROWS, WIDTH, seed=seed + 2),
        unit_vectors(QUEUED, WIDTH, seed=seed + 3),
    )
    number = np.arange(ROWS)
    marks = IMAGE_ID, VALID, 100 + number, number
    none = np.full(QUEUED, -1)
    sides = (
        Side(rows, *marks, teacher),
        (Side(texts, *marks), Side(queue, QUEUE_ID, WAITING, none, none)),
    )
    return (Scale(jnp.array(7.0), jnp.array(-2.0)), *jax.tree.map(jnp.asarray, sides))


def on_devices(devices, fsdp=1, tensor=1):
    return jax.set_mesh(
        jax.make_mesh(
            (devices // fsdp // tensor, fsdp, tensor),
            ("data", "fsdp", "tensor"),
            (AxisType.Auto,) * 3,
            devices=jax.devices()[:devices],
        )
    )


def results(*arguments):
    return jax.jit(lambda *a: walk(*a, FOLDS))(*arguments)


def reference(scale, rows, candidates):
    """What the first five folds are, from the matrix."""
    texts, there, image_id = (
        np.concatenate([np.asarray(getattr(side, name)) for side in candidates])
        for name in ("vectors", "valid", "image_id")
    )

    def logits_of(vectors):
        return float(scale.factor) * np.float64(vectors) @ np.float64(texts[there]).T - 2.0

    logits, teacher = logits_of(rows.vectors), logits_of(rows.teacher)
    positive = IMAGE_ID[:, None] == image_id[there]

    def log_softmax(x):
        x = x - x.max(axis=1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=1, keepdims=True))

    log_p, found = log_softmax(logits), []
    for smoothing in (0.0, 0.2):
        target = (1 - smoothing) * positive / positive.sum(axis=1, keepdims=True)
        found.append(-((target + smoothing / there.sum()) * log_p).sum(axis=1))
    signs = np.where(positive, 1, -1)
    found.append(np.log1p(np.exp(-signs * logits)).sum(axis=1))
    found.append(-(np.exp(log_softmax(teacher)) * log_p).sum(axis=1))
    found.append(np.take_along_axis(positive, logits.argmax(axis=1)[:, None], axis=1)[:, 0])
    return found


@pytest.mark.parametrize("chunk", [1, 5, 24, 1024])
@pytest.mark.parametrize("devices", [None, (1, 1, 1), (8, 2, 1), (8, 2, 2)])
def test_folds_are_those_of_the_matrix(devices, chunk, monkeypatch):
    monkeypatch.setattr(walking, "CHUNK", chunk)
    given = arguments()
    if devices is None:
        found = results(*given)
    else:
        with on_devices(*devices):
            found = results(*given)
    for one, expected in zip(found, reference(*given), strict=False):
        np.testing.assert_allclose(np.asarray(one)[VALID], expected[VALID], rtol=2e-6)


def naive(scale, rows, candidates):
    """The first four folds in plain JAX, for its gradients."""
    texts, there, image_id = (
        jnp.concatenate([getattr(side, name) for side in candidates])
        for name in ("vectors", "valid", "image_id")
    )

    def logits_of(vectors):
        cosines = jnp.matmul(vectors, texts.T, precision="highest")
        return jnp.where(there, scale.factor * cosines + scale.offset, -1e30)

    logits = logits_of(rows.vectors)
    teacher = jax.lax.stop_gradient(jax.nn.softmax(logits_of(rows.teacher)))
    positive = (rows.image_id[:, None] == image_id) & there
    log_p, found = jax.nn.log_softmax(logits), []
    for smoothing in (0.0, 0.2):
        target = (1 - smoothing) * positive / positive.sum(axis=1, keepdims=True)
        target = target + smoothing * there / there.sum()
        found.append(-jnp.where(there, target * log_p, 0).sum(axis=1))
    signs = jnp.where(positive, 1, -1)
    found.append(-jnp.where(there, jax.nn.log_sigmoid(signs * logits), 0).sum(axis=1))
    found.append(-jnp.where(there, teacher * log_p, 0).sum(axis=1))
    return found


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("devices", [(1, 1, 1), (8, 2, 2)])
def test_gradients_are_those_of_the_matrix(devices, learns, monkeypatch):
    monkeypatch.setattr(walking, "CHUNK", 8)
    weights = np.random.default_rng(5).normal(size=(4, ROWS)) * VALID
    scale, rows, candidates = arguments()

    def loss(function, scale, vectors, *others):
        sides = [c._replace(vectors=v) for c, v in zip(candidates, others, strict=True)]
        found = function(scale, rows._replace(vectors=vectors), tuple(sides))
        return sum((w * one).sum() for w, one in zip(weights, found, strict=False))

    given = scale, rows.vectors, *(side.vectors for side in candidates)
    expected = jax.grad(lambda *a: loss(naive, *a), range(4))(*given)
    with on_devices(*devices):
        found = jax.jit(
            jax.grad(lambda *a: loss(lambda *b: walk(*b, FOLDS, learns), *a), range(4))
        )(*given)
    assert_close(found[:2], expected[:2])
    assert_close(found[2:], expected[2:] if learns else jax.tree.map(jnp.zeros_like, expected[2:]))
    assert all(np.abs(x).max() > 1e-2 for x in jax.tree.leaves(expected))


def temporary_bytes(batch, tokens):
    """Of a device of eight: losses, gradients, draws, and the partners that were drawn."""

    def sides(images, texts):
        number = jnp.arange(batch)
        return (Side(x, number, number >= 0, number, number) for x in (images, texts))

    def loss(vectors, features):
        rows, candidates = sides(*vectors)
        scale = Scale(jnp.ones(()), jnp.zeros(()))
        losses, (drawn, _) = walk(scale, rows, (candidates,), (InfoNce(), Draw(KEY)))
        fused = fetch(features, drawn) if tokens else jnp.zeros(1)
        return losses.mean() + jnp.square(fused).mean(), drawn

    with on_devices(8, 2):
        split = NamedSharding(jax.sharding.get_mesh(), PartitionSpec(BATCH_AXES))
        of = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=split)
              for shape in ((batch, 32), (batch, 32), (batch, max(tokens, 1), 64))]  # fmt: skip
        learn = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
        compiled = learn.lower(tuple(of[:2]), of[2]).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("tokens", [0, 16])
def test_memory_grows_with_the_rows_and_not_with_their_square(tokens, monkeypatch):
    monkeypatch.setattr(walking, "CHUNK", 64)
    small, large = (temporary_bytes(batch, tokens) for batch in (512, 4096))
    assert large < 8.5 * small  # the matrix is 64 times as large
    share = 4096 // 8
    fetched = 4 * share * tokens * 64  # bytes of what a device fetches
    assert large < 4 * share * 64 * 12 + 6 * fetched  # 12 arrays as large as a chunk's scores


def test_draws_are_the_largest_sums_of_logit_and_noise():
    """Of valid candidates of this batch that show another picture, on any number of devices."""
    given = _, rows, (texts, _) = arguments()
    chosen, found = results(*given)[5]
    logits = 7.0 * np.asarray(rows.vectors) @ np.asarray(texts.vectors).T
    noise = np.asarray(pair_gumbel(KEY, rows.example, texts.example))
    allowed = (IMAGE_ID[:, None] != IMAGE_ID) & VALID & VALID[:, None]
    expected = np.where(allowed, logits + noise, -np.inf).argmax(axis=1)
    np.testing.assert_array_equal(found, VALID)
    np.testing.assert_array_equal(np.asarray(chosen)[VALID], expected[VALID])
    with on_devices(8, 2):
        elsewhere = results(*given)
    for here, there in zip(results(*given)[5:], elsewhere[5:], strict=True):
        np.testing.assert_array_equal(there[0][VALID], here[0][VALID])
        np.testing.assert_array_equal(there[1], here[1])


@pytest.mark.parametrize("evenly", [0.0, 0.3, 1.0])
def test_draws_have_the_distribution_of_the_softmax(evenly):
    """Chi-squared of 20,000 draws of every row against (1 − ε) softmax + ε even."""
    rows, times = 8, 20_000
    vectors = unit_vectors(rows, WIDTH), unit_vectors(rows, WIDTH, seed=1)
    image_id, valid = jnp.array([0, 0, 1, 2, 3, 4, 4, 5]), jnp.arange(rows) != 3
    marks = image_id, valid, jnp.arange(rows), jnp.arange(rows)
    sides = Side(jnp.array(vectors[0]), *marks), Side(jnp.array(vectors[1]), *marks)
    scale = Scale(jnp.array(3.0), jnp.zeros(()))

    @jax.jit
    @jax.vmap
    def draw(key):
        return walk(scale, sides[0], (sides[1],), (Draw(key, evenly),))[0][0]

    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), times)))
    logits = 3.0 * np.float64(vectors[0]) @ np.float64(vectors[1]).T
    allowed = np.asarray((image_id[:, None] != image_id) & valid & valid[:, None])
    probabilities = negative_probabilities(logits, allowed, evenly)
    for row in np.flatnonzero(valid):
        p = probabilities[row]
        seen = np.bincount(drawn[:, row], minlength=rows)
        assert not seen[~allowed[row]].any()
        expected = times * p[allowed[row]]
        statistic = ((seen[allowed[row]] - expected) ** 2 / expected).sum()
        # The mean of the distribution is its degrees of freedom, at most 6; 99.99 % lie below 28.
        assert statistic < 28
    assert len(np.unique(drawn)) > 4


def test_a_row_without_another_picture_draws_none():
    scale, rows, candidates = arguments()
    alone = [side._replace(image_id=jnp.zeros_like(side.image_id)) for side in (rows, *candidates)]
    _, found = results(scale, alone[0], tuple(alone[1:]))[5]
    assert not np.asarray(found).any()
