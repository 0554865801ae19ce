"""Image-text contrastive learning: by a softmax, by a sigmoid, token by token."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.errors import InputError
from mmjax.models import build_model
from mmjax.objectives import Features
from mmjax.objectives.contrastive import (
    Contrastive,
    SigmoidContrastive,
    TokenContrastive,
    info_nce,
    late_interaction,
    sigmoid_loss,
)
from tests.models.reference import assert_close, split, tiny_batch, tiny_model
from tests.objectives.fakes import FakeModel, batch_of, loss_on, unit_vectors

SAME = [5, 5, 1, 2, 5, 2, 9, 9, 9, 0, 3]
SOME = [True, False, True, True, True] * 2 + [False]
CASES = {  # pictures and valid rows
    "all_different": (range(11), [True] * 11),
    "padding": (range(11), SOME),
    "captions_of_one_picture": (SAME, [True] * 11),
    "both": (SAME, SOME),
    "one_row": ([3], [True]),
}
BIAS = -3.0


def batch(case="both", seed=0):
    """Pictures of five tokens and texts of four, some of them padding, all of unit length."""
    image_id, valid = CASES[case]
    rows = len(valid)
    lengths = np.random.default_rng(seed).integers(1, 5, rows)
    return batch_of(
        rows,
        image_id=np.array(image_id, np.int32),
        valid=np.array(valid),
        image=unit_vectors(rows, 5, 6, seed=seed),
        text=unit_vectors(rows, 4, 6, seed=seed + 1),
        text_mask=np.arange(4) < lengths[:, None],
    )


def run(objective, batch, scale=10.0, bias=0.0, **parts):
    return objective(Features(FakeModel(scale, bias, **parts), batch), jax.random.key(0))


# ---- the papers, in float64 and with loops over the rows that count


def in_float64(batch):
    return {name: np.asarray(x, np.float64 if x.dtype == jnp.float32 else None)
            for name, x in batch.items()}  # fmt: skip


def cosines(batch):
    """Of pooled vectors, pictures × texts, twice: both directions agree."""
    scores = batch["image"][:, 0] @ batch["text"][:, 0].T
    return scores, scores.T


def token_cosines(batch):
    """Equations 3 to 5 of FILIP."""
    rows = len(batch["valid"])
    to_text, to_image = np.zeros((2, rows, rows))
    for i in range(rows):
        for j in range(rows):
            words = batch["text"][j][batch["text_mask"][j]]
            pairs = batch["image"][i] @ words.T
            to_text[i, j], to_image[j, i] = pairs.max(axis=1).mean(), pairs.max(axis=0).mean()
    return to_text, to_image


def softmax_reference(batch, similarities=cosines, scale=10.0, smoothing=0.0):
    """The mean of −Σ target · log p of both directions."""
    rows, total = np.flatnonzero(batch["valid"]), 0.0
    for scores in similarities(batch):
        for i in rows:
            logits = scale * scores[i, rows]
            log_p = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
            same = batch["image_id"][rows] == batch["image_id"][i]
            target = (1 - smoothing) * same / same.sum() + smoothing / len(rows)
            total -= (target * log_p).sum() / 2
    return total / len(rows)


def sigmoid_reference(batch, scale=10.0, bias=BIAS):
    """Algorithm 1 of SigLIP, with more positives than the diagonal."""
    rows, total = np.flatnonzero(batch["valid"]), 0.0
    for i in rows:
        for j in rows:
            z = 1 if batch["image_id"][i] == batch["image_id"][j] else -1
            logit = scale * batch["image"][i, 0] @ batch["text"][j, 0] + bias
            total += np.log1p(np.exp(-z * logit))
    return total / len(rows)


def token_reference(batch, scale=10.0, smoothing=0.0):
    return softmax_reference(batch, token_cosines, scale, smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("case", CASES)
def test_the_softmax_agrees_with_the_papers(case, scale, smoothing):
    loss = run(Contrastive(smoothing=smoothing), batch(case), scale)
    assert loss.weight == sum(CASES[case][1])
    expected = softmax_reference(in_float64(batch(case)), scale=scale, smoothing=smoothing)
    np.testing.assert_allclose(loss.total / loss.weight, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("case", CASES)
def test_the_sigmoid_agrees_with_the_paper(case, scale):
    loss = run(SigmoidContrastive(), batch(case), scale, BIAS)
    assert loss.weight == sum(CASES[case][1])
    expected = sigmoid_reference(in_float64(batch(case)), scale)
    np.testing.assert_allclose(loss.total / loss.weight, expected, rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("case", CASES)
def test_tokens_agree_with_the_paper(case, smoothing):
    loss = run(TokenContrastive(smoothing=smoothing), batch(case))
    assert loss.weight == sum(CASES[case][1])
    expected = token_reference(in_float64(batch(case)), smoothing=smoothing)
    np.testing.assert_allclose(loss.total / loss.weight, expected, rtol=1e-5, atol=1e-6)


OBJECTIVES = {
    "softmax": (Contrastive(), 0.0, softmax_reference),
    "smoothed": (Contrastive(smoothing=0.2), 0.0,
                 lambda batch: softmax_reference(batch, smoothing=0.2)),
    "sigmoid": (SigmoidContrastive(), BIAS, sigmoid_reference),
    "tokens": (TokenContrastive(), 0.0, token_reference),
}  # fmt: skip


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_are_slopes_of_the_reference(name):
    objective, bias, reference = OBJECTIVES[name]

    def mean(changed):
        loss = run(objective, {**batch(), **changed}, bias=bias)
        return loss.total / loss.weight

    changed = {side: batch()[side] for side in ("image", "text")}
    gradient, exact, step = jax.grad(mean)(changed), in_float64(batch()), 1e-6
    for side, array in changed.items():
        slopes = np.zeros(array.shape)
        for place in np.ndindex(array.shape):
            ends = []
            for sign in (1, -1):
                moved = exact[side].copy()
                moved[place] += sign * step
                ends.append(reference({**exact, side: moved}))
            slopes[place] = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(gradient[side], slopes, atol=2e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_padding_holds_does_not_matter(name):
    objective, bias, _ = OBJECTIVES[name]
    given = batch("padding")
    invalid = ~np.asarray(given["valid"])
    # An invalid row may even repeat a picture's number, and have no word at all.
    other = given | {
        "image_id": jnp.where(invalid, 0, given["image_id"]),
        "text_mask": given["text_mask"] & ~invalid[:, None],
        "text": jnp.where(given["text_mask"][..., None] & ~invalid[:, None, None],
                          given["text"], 7.0),
    }  # fmt: skip

    def total(image, batch):
        loss = run(objective, {**batch, "image": image}, bias=bias)
        return loss.total, loss

    expected = run(objective, given, bias=bias)
    image = jnp.where(invalid[:, None, None], 9.0, given["image"])
    gradient, seen = jax.grad(total, has_aux=True)(image, other)
    np.testing.assert_allclose(seen.total, expected.total, rtol=1e-5)
    assert_close(seen.metrics, expected.metrics)
    assert np.isfinite(gradient).all()
    assert not gradient[invalid].any()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_eight_devices_compute_what_one_does(name):
    objective, rows = OBJECTIVES[name][0], 24
    image_id = np.random.default_rng(0).integers(0, 15, rows)
    given = batch_of(
        rows,
        image_id=image_id.astype(np.int32),
        valid=np.arange(rows) % 7 != 3,
        image=unit_vectors(rows, 5, 6),
        text=unit_vectors(rows, 4, 6, seed=1),
        text_mask=np.arange(4) < np.arange(rows)[:, None] % 4 + 1,
    )
    one, eight = (loss_on(devices, objective, given, 10.0) for devices in (1, 8))
    assert_close(eight, one)
    assert np.abs(one[0][0]).max() > 1e-3


# ---- details


def test_accuracy_counts_any_caption_of_the_picture():
    text = np.eye(4, dtype=np.float32)
    image = text[[1, 0, 3, 2]]  # each picture is nearest to its neighbour's caption
    for image_id, accuracy in (([7, 7, 8, 9], 0.5), ([7, 7, 9, 9], 1.0), (range(4), 0.0)):
        given = batch_of(4, image=image, text=text, image_id=np.array(image_id),
                         text_mask=np.ones((4, 1), bool))  # fmt: skip
        for objective, name in (
            (Contrastive(), "contrastive"),
            (SigmoidContrastive(), "sigmoid_contrastive"),
            (TokenContrastive(), "token_contrastive"),
        ):
            metrics = run(objective, given, scale=7.0).metrics
            total, weight = metrics[f"{name}/accuracy"]
            assert total / weight == accuracy
            assert metrics["contrastive/logit_scale"] == (7.0, 1.0)


def test_uniform_scores_cost_the_logarithm_of_the_candidates():
    logits = jnp.zeros((6, 6))
    for smoothing in (0.0, 0.3):
        loss = info_nce(logits, jnp.eye(6, dtype=bool), jnp.arange(6) < 4, smoothing)
        np.testing.assert_allclose(loss[:4], np.log(4), rtol=1e-6)


def test_the_best_scores_under_smoothing_are_the_target():
    """Where the softmax is the target itself, the gradient is zero."""
    positives, valid = jnp.array([[True, True, False, False]]), jnp.array([True] * 3 + [False])
    target = np.array([0.45, 0.45, 0.0]) + 0.1 / 3
    logits = jnp.array([[*np.log(target), 50.0]], jnp.float32)
    gradient = jax.grad(lambda x: info_nce(x, positives, valid, 0.1).sum())(logits)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_scores_far_from_zero_stay_finite():
    logits = jnp.array([[1e4, -1e4, 3e4]])
    positives, valid = jnp.array([[False, True, False]]), jnp.array([True, True, False])
    np.testing.assert_allclose(info_nce(logits, positives, valid), 2e4)
    np.testing.assert_allclose(sigmoid_loss(logits, positives, valid), 2e4)


def test_the_two_directions_of_tokens_differ():
    """Of one word that is a patch and one that is not, the picture sees the first alone."""
    patches, words = jnp.eye(3)[None, :1], jnp.eye(3)[None, :2]
    to_text, to_image = late_interaction(patches, words, jnp.ones((1, 1), bool),
                                         jnp.ones((1, 2), bool))  # fmt: skip
    np.testing.assert_allclose([to_text[0, 0], to_image[0, 0]], [1, 0.5])


def test_a_class_token_is_no_patch():
    given = batch("all_different")
    config = SimpleNamespace(image=SimpleNamespace(pool="class_token"))
    behind = jnp.concatenate([jnp.full((11, 1, 6), 5.0), given["image"]], axis=1)
    with_token = run(TokenContrastive(), given | {"image": behind}, config=config)
    np.testing.assert_allclose(with_token.total, run(TokenContrastive(), given).total, rtol=1e-6)


def test_tokens_of_a_model_go_through_its_projections():
    config = tiny_model()
    graph, params = split(lambda: build_model(config, nnx.Rngs(0)))
    given = {name: jnp.array(x) for name, x in tiny_batch(config, 6).items()}

    @jax.jit
    def run(params):
        features = Features(nnx.merge(graph, params), given)
        loss = TokenContrastive()(features, jax.random.key(0))
        return loss.total / loss.weight, features.image.tokens, features.text.tokens

    loss, patches, words = run(params)

    def project(tokens, side):
        p = params["contrastive"][f"{side}_projection"]
        x = np.asarray(tokens, np.float64) @ p["kernel"] + p["bias"]
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    exact = in_float64(given)
    exact |= {"image": project(patches[:, 1:], "image"), "text": project(words, "text")}
    scale = np.exp(params["contrastive"]["logit_scale"])
    np.testing.assert_allclose(loss, token_reference(exact, scale=scale), rtol=1e-5)


def test_what_cannot_be_is_refused():
    with pytest.raises(InputError, match=r"objectives\.contrastive\.smoothing is 1\.5"):
        Contrastive(smoothing=1.5).check("contrastive", FakeModel())
    for objective in (Contrastive, SigmoidContrastive, TokenContrastive):
        with pytest.raises(InputError, match=r"model\.embedding_width"):
            objective().check("contrastive", FakeModel(contrastive=None))
        objective().check("contrastive", FakeModel())
