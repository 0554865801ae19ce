"""Contrastive learning against a moving average and a queue."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.errors import InputError
from mmjax.objectives.contrastive import Contrastive
from mmjax.objectives.features import Features
from mmjax.objectives.masked_language import MaskedLanguage
from mmjax.objectives.matching import Matching
from mmjax.objectives.momentum import EMPTY, MomentumContrastive, enqueue, momentum_nce
from mmjax.sharding import make_mesh
from tests.models.reference import assert_close
from tests.objectives.fakes import FakeModel, batch_of
from tests.runs import one_device
from tests.training.test_step import Run

KEY = jax.random.key(0)
SCALE = 4.0
ROWS, WIDTH, PLACES = 4, 5, 12


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def expected_nce(logits, teacher, positives, there, alpha):
    """A query at a time, over the candidates that are there."""
    losses = []
    for row, soft, same in zip(logits, teacher, positives, strict=True):
        same = same[there] / max(same[there].sum(), 1)
        target = alpha * np.exp(log_softmax(soft[there])) + (1 - alpha) * same
        losses.append(-(target * log_softmax(row[there])).sum())
    return np.array(losses)


def case(queries=5, candidates=11, seed=0):
    rng = np.random.default_rng(seed)
    logits, teacher = 3 * rng.normal(size=(2, queries, candidates)).astype(np.float32)
    positives = rng.random((queries, candidates)) < 0.2
    positives[np.arange(queries), np.arange(queries)] = True
    there = np.arange(candidates) % 4 != 3
    there[:queries] = True
    return logits, teacher, positives, there


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("shape", [(5, 11), (1, 1), (3, 3)])
def test_agrees_with_the_paper(alpha, shape):
    arrays = case(*shape)
    found = momentum_nce(*map(jnp.asarray, arrays), alpha)
    np.testing.assert_allclose(found, expected_nce(*arrays, alpha), rtol=1e-5, atol=1e-6)


def test_the_gradient_is_probability_less_target():
    logits, teacher, positives, there = case()
    gradients = jax.grad(
        lambda a, b: momentum_nce(a, b, jnp.array(positives), jnp.array(there), 0.4).sum(),
        (0, 1),
    )(jnp.array(logits), jnp.array(teacher))
    for row, same, found, soft in zip(logits, positives, gradients[0], teacher, strict=True):
        same = same[there] / same[there].sum()
        target = 0.4 * np.exp(log_softmax(soft[there])) + 0.6 * same
        np.testing.assert_allclose(
            found[there], np.exp(log_softmax(row[there])) - target, atol=1e-6
        )
    assert not gradients[0][:, ~there].any()
    assert not gradients[1].any()


def test_the_queue_holds_the_last_batches():
    """Written as a list from which the oldest are dropped."""
    rng = np.random.default_rng(0)
    queue, fifo = jnp.full((PLACES // ROWS, ROWS, 2), -1.0), []
    for step in range(8):
        newest = rng.normal(size=(ROWS, 2)).astype(np.float32)
        queue = enqueue(queue, jnp.array(newest), jnp.array(step))
        fifo = [*fifo, *newest][-PLACES:]
        held = np.asarray(queue).reshape(PLACES, 2)
        missing = PLACES - len(fifo)
        assert (held == -1).all(axis=1).sum() == missing
        found = held[(held != -1).all(axis=1)]
        np.testing.assert_array_equal(np.sort(found, axis=0), np.sort(fifo, axis=0))
    # The step times the rows would be more than an int32 holds.
    late = enqueue(queue, jnp.array(-newest), jnp.array(2**31 - 1, jnp.int32))
    late = np.asarray(late).reshape(PLACES, 2)
    np.testing.assert_array_equal(late[4:8], -newest)
    np.testing.assert_array_equal(np.delete(late, np.s_[4:8], 0), np.delete(held, np.s_[4:8], 0))


def encodings(seed, rows=ROWS):
    """Online pictures and texts, and the average's."""
    return unit(np.random.default_rng(seed).normal(size=(4, rows, WIDTH)))


def features_of(arrays, image_id, valid, memory=None, step=0, average=True):
    model = FakeModel(SCALE)
    model.contrastive.width = WIDTH
    image, text, *others = map(jnp.asarray, arrays)
    given = Features(
        model,
        batch_of(len(image_id), image_id=np.array(image_id), valid=np.array(valid)),
        step=jnp.array(step) if average else None,
        memory={} if memory is None else {"momentum_contrastive": memory},
        average=model if average else None,
    )
    vars(given).update(image_embedding=image, text_embedding=text)
    if average:
        vars(given.average).update(image_embedding=others[0], text_embedding=others[1])
    return given


OPTIONS = {"distill": 0.4, "ramp_steps": 4, "queue_size": PLACES}
IMAGE_ID = np.array([[3, 7, 3, 9], [7, 8, 1, 2], [5, 9, 6, 6], [3, 2, 1, 0], [1, 1, 8, 4]])


def run(steps=5, valid=None, encoded=encodings):
    """The losses of the first steps, each on its own batch, the memory passed on."""
    objective = MomentumContrastive(**OPTIONS)
    memory = objective.memory(features_of(encodings(0), IMAGE_ID[0], [True] * ROWS).model, ROWS)
    losses = []
    for step in range(steps):
        rows = np.ones(ROWS, bool) if valid is None else valid[step]
        features = features_of(encoded(step), IMAGE_ID[step], rows, memory, step)
        losses.append(objective(features, KEY))
        memory = losses[-1].memory
    return losses


def expected_run(valid):
    """The mean loss of every step, from a list of what was encoded before."""
    seen = {"image": [], "text": [], "id": []}
    means = []
    for step, image_id in enumerate(IMAGE_ID):
        image, text, image_m, text_m = encodings(step)
        rows = valid[step]
        images = np.array([*image_m[rows], *seen["image"][-PLACES:]])
        texts = np.array([*text_m[rows], *seen["text"][-PLACES:]])
        positives = image_id[rows, None] == np.array([*image_id[rows], *seen["id"][-PLACES:]])
        everything, alpha = np.ones(len(images), bool), 0.4 * min(step / 4, 1)
        both = [
            expected_nce(SCALE * mine[rows] @ all_.T, SCALE * average[rows] @ all_.T, positives,
                         everything, alpha)
            for mine, average, all_ in ((image, image_m, texts), (text, text_m, images))
        ]  # fmt: skip
        means.append(np.mean(both))
        # A place of the queue is lost to a row that does not count: `None` never matches.
        for name, new in (("image", image_m), ("text", text_m), ("id", image_id)):
            seen[name] += list(new[rows])
    return means


def test_five_steps_agree_with_the_paper():
    """More than the queue holds, several captions of a picture, α growing."""
    valid = np.ones(IMAGE_ID.shape, bool)
    losses = run()
    for loss, expected in zip(losses, expected_run(valid), strict=True):
        np.testing.assert_allclose(loss.total / loss.weight, expected, rtol=1e-5)
    filled = [loss.metrics["momentum_contrastive/queue_filled"] for loss in losses]
    assert [int(count) for count, _ in filled] == [0, 4, 8, 12, 12]
    assert all(size == PLACES for _, size in filled)
    np.testing.assert_array_equal(losses[-1].memory["image_id_queue"], IMAGE_ID[[3, 4, 2]])


def test_invalid_rows_count_nowhere():
    """Neither in their own step nor, from the queue, in later ones."""
    valid = np.ones(IMAGE_ID.shape, bool)
    valid[0, 1] = valid[1, :2] = valid[3, 3] = False

    def other(step):
        arrays = encodings(step)
        return np.where(valid[step][:, None], arrays, unit(np.ones((4, ROWS, WIDTH))))

    losses, others = run(valid=valid), run(valid=valid, encoded=other)
    for step, (loss, changed) in enumerate(zip(losses, others, strict=True)):
        assert loss.weight == valid[step].sum()
        np.testing.assert_allclose(changed.total, loss.total, rtol=1e-6)
    # (three steps: until then no place has been written twice)
    for loss, expected in zip(losses[:4], expected_run(valid)[:4], strict=True):
        np.testing.assert_allclose(loss.total / loss.weight, expected, rtol=1e-5)
    assert (np.asarray(losses[1].memory["image_id_queue"]).ravel()[:6] == EMPTY).sum() == 3


def test_evaluation_is_the_plain_loss():
    """Without an average there is no queue either, and nothing to remember."""
    features = features_of(encodings(0), IMAGE_ID[0], [True, True, True, False], average=False)
    found = MomentumContrastive(**OPTIONS)(features, KEY)
    expected = Contrastive()(features, KEY)
    np.testing.assert_allclose(found.total, expected.total, rtol=1e-6)
    assert found.weight == expected.weight
    assert found.memory == {}
    accuracy, plain = "momentum_contrastive/accuracy", "contrastive/accuracy"
    assert found.metrics[accuracy] == expected.metrics[plain]


def test_beside_the_plain_loss_each_keeps_its_own():
    """Without an average both ask the same walk, and only one of them smooths its target."""
    options = encodings(0), IMAGE_ID[0], [True] * ROWS
    momentum, plain = MomentumContrastive(**OPTIONS), Contrastive(smoothing=0.5)
    alone = [float(each(features_of(*options, average=False), KEY).total)
             for each in (momentum, plain)]  # fmt: skip
    together = features_of(*options, average=False)
    for each in (plain, momentum):
        each.prepare(together, KEY)
    found = [float(each(together, KEY).total) for each in (momentum, plain)]
    np.testing.assert_allclose(found, alone, rtol=1e-6)
    assert abs(alone[0] - alone[1]) > 1e-3


def test_the_accuracy_is_among_all_candidates():
    """Each picture is nearest to its own text, or to one in the queue."""
    texts = np.eye(WIDTH, dtype=np.float32)[:ROWS]
    memory = {
        "image_queue": jnp.zeros((1, 4, WIDTH)),
        "text_queue": jnp.array(2 * texts)[None],
        "image_id_queue": jnp.array([[3, 8, EMPTY, EMPTY]]),
    }
    features = features_of([texts] * 4, [3, 7, 5, 9], [True] * 4, memory)
    loss = MomentumContrastive(**OPTIONS)(features, KEY)
    hits, count = loss.metrics["momentum_contrastive/accuracy"]
    assert (hits, count) == (3, 4)


@pytest.mark.parametrize(("size", "take"), [(10, "8 or 12"), (2, "take 4"), (0, "take 4")])
def test_a_queue_that_batches_do_not_fill_is_refused(size, take):
    model = SimpleNamespace(contrastive=SimpleNamespace(width=WIDTH))
    with pytest.raises(InputError, match=rf"queue_size is {size}.*batch_size = 4.*{take}"):
        MomentumContrastive(queue_size=size).memory(model, 4)


@pytest.mark.slow
def test_eight_devices_compute_what_one_does():
    """Losses, gradients, the average and the queue, beside what else learns from an average."""
    objectives = {
        "momentum_contrastive": MomentumContrastive(weight=1.0, queue_size=112, ramp_steps=2),
        "matching": Matching(weight=1.0, smoothing=0.2),
        "masked_language": MaskedLanguage(weight=1.0, distill=0.4, ramp_steps=2),
    }
    (eight, metrics), (one, expected) = (
        Run(mesh, objectives=objectives, ema_decay=0.75).steps(3)[-1]
        for mesh in (make_mesh(data=4, fsdp=2), one_device())
    )
    assert_close(metrics, expected)
    assert_close(eight.opt_state[0], one.opt_state[0])  # the gradients
    assert_close(eight.ema, one.ema)
    queues, alone = (state.memory["momentum_contrastive"] for state in (eight, one))
    assert_close(queues, alone)
    # Full, but for the rows that do not count.
    assert 0.9 < expected["momentum_contrastive/queue_filled"] < 1
