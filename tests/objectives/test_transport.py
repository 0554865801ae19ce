"""Word-region alignment by optimal transport."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from mmjax.objectives.pairing import signed_distance
from mmjax.objectives.transport import cosine_distance, transport_distance, transport_plan
from tests.weights.families.recorded import Recorded

LENGTHS, COUNTS = (7, 3, 1, 5), (4, 6, 5, 1)


def tokens(width=8, seed=0):
    """Words and regions, and their masks; padding is at the end of words and among regions."""
    rng = np.random.default_rng(seed)
    rows = len(LENGTHS)
    words = rng.normal(size=(rows, max(LENGTHS), width)).astype(np.float32)
    regions = rng.normal(size=(rows, max(COUNTS), width)).astype(np.float32)
    word_mask = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    region_mask = rng.permuted(np.arange(max(COUNTS)) < np.array(COUNTS)[:, None], axis=1)
    return words, regions, word_mask, region_mask


def plain_cost(words, regions):
    """1 - cosine, pair by pair."""
    words, regions = words.astype(np.float64), regions.astype(np.float64)
    return np.array(
        [[1 - w @ r / np.sqrt((w @ w) * (r @ r)) for r in regions] for w in words]
    ).reshape(len(words), len(regions))


def plain_plan(cost, beta=0.5, iterations=50):
    """Xie et al. 2019, algorithm 1, of one example without padding, [words, regions]."""
    n, m = cost.shape
    kernel, plan, b = np.exp(-cost / beta).T, np.ones((m, n)), np.ones(n) / n
    for _ in range(iterations):
        q = kernel * plan
        a = (np.ones(m) / m) / (q @ b)
        b = (np.ones(n) / n) / (q.T @ a)
        plan = np.diag(a) @ q @ np.diag(b)
    return plan.T


def plain_distance(words, regions, word_mask, region_mask):
    """Of every example, its padding cut off."""
    rows = zip(words, regions, word_mask, region_mask, strict=True)
    costs = [plain_cost(w[keep], r[there]) for w, r, keep, there in rows]
    return np.array([(cost * plain_plan(cost)).sum() for cost in costs])


def test_agrees_with_the_paper():
    words, regions, word_mask, region_mask = (jnp.array(x) for x in tokens())
    found = transport_distance(words, regions, word_mask, region_mask)
    np.testing.assert_allclose(found, plain_distance(*tokens()), rtol=1e-5)
    cost = cosine_distance(words, regions)
    plan = np.asarray(transport_plan(cost, word_mask, region_mask))
    for i, (keep, there) in enumerate(zip(*tokens()[2:], strict=True)):
        expected = plain_plan(plain_cost(tokens()[0][i, keep], tokens()[1][i, there]))
        np.testing.assert_allclose(plan[i][keep][:, there], expected, atol=1e-6)
        np.testing.assert_allclose(plan[i].sum(axis=1)[keep], 1 / keep.sum(), rtol=1e-5)
        assert not plan[i][~keep].any()
        assert not plan[i][:, ~there].any()


def test_many_steps_find_the_cheapest_plan():
    """Between as many words as regions that is the cheapest assignment (Birkhoff)."""
    cost = plain_cost(*np.random.default_rng(3).normal(size=(2, 6, 5)))
    rows, columns = linear_sum_assignment(cost)
    mask = jnp.ones((1, 6), bool)
    plan = transport_plan(jnp.array(cost[None], jnp.float32), mask, mask, 0.5, 500)[0]
    np.testing.assert_allclose((plan * cost).sum(), cost[rows, columns].mean(), rtol=1e-3)
    np.testing.assert_allclose(plan.sum(axis=0), 1 / 6, rtol=1e-3)


def test_padding_changes_nothing():
    words, regions, word_mask, region_mask = tokens()
    masks = jnp.array(word_mask), jnp.array(region_mask)

    def distances(words, regions):
        found = transport_distance(jnp.array(words), jnp.array(regions), *masks)
        return found.sum(), found

    noisy = np.where(word_mask[..., None], words, 9), np.where(region_mask[..., None], regions, 0)
    (_, expected), gradients = jax.value_and_grad(distances, (0, 1), has_aux=True)(words, regions)
    (_, found), noisy_gradients = jax.value_and_grad(distances, (0, 1), has_aux=True)(*noisy)
    np.testing.assert_array_equal(found, expected)
    for gradient, other, mask in zip(gradients, noisy_gradients, masks, strict=True):
        np.testing.assert_array_equal(gradient, other)
        assert gradient[mask].any(axis=-1).all()
        assert not gradient[~mask].any()


def test_the_plan_is_no_path_for_gradients():
    words, regions, word_mask, region_mask = (jnp.array(x) for x in tokens())
    plan = transport_plan(cosine_distance(words, regions), word_mask, region_mask)

    def at_the_plan(words):
        return (cosine_distance(words, regions) * plan).sum()

    found = jax.grad(lambda w: transport_distance(w, regions, word_mask, region_mask).sum())(words)
    np.testing.assert_allclose(found, jax.grad(at_the_plan)(words), atol=1e-7)


@pytest.mark.parametrize("empty", ["words", "regions", "both"])
def test_nothing_costs_nothing(empty):
    words, regions, word_mask, region_mask = tokens()
    word_mask[0] &= empty == "regions"
    region_mask[0] &= empty == "words"
    masks = jnp.array(word_mask), jnp.array(region_mask)

    def total(words):
        found = transport_distance(words, jnp.array(regions), *masks)
        return found.sum(), found

    gradient, found = jax.grad(total, has_aux=True)(jnp.array(words))
    assert found[0] == 0
    assert not gradient[0].any()
    np.testing.assert_allclose(found[1:], plain_distance(*tokens())[1:], rtol=1e-5)


def test_half_precision_tokens_are_compared_in_full():
    words, regions, *masks = (jnp.array(x) for x in tokens())
    rounded = words.astype(jnp.bfloat16), regions.astype(jnp.bfloat16)
    expected = transport_distance(*(x.astype(jnp.float32) for x in rounded), *masks)
    np.testing.assert_array_equal(transport_distance(*rounded, *masks), expected)


def test_true_pairs_count_up_and_false_ones_down():
    distance = jnp.array([0.5, 0.25, 8.0, 2.0])
    labels, counted = jnp.array([True, False, True, True]), jnp.array([True, True, False, True])
    total, weight = signed_distance(distance, labels, counted)
    assert (total, weight) == (0.5 - 0.25 + 2.0, 3)


def test_uniter(shared):
    recorded = Recorded(shared / "goldens" / "uniter_dev.npz")
    word_mask = jnp.array(~recorded["in/itm/ot_inputs.txt_pad"])
    region_mask = jnp.array(~recorded["in/itm/ot_inputs.img_pad"])
    plan = transport_plan(jnp.array(recorded["out/itm/ot_cost"]), word_mask, region_mask)
    recorded.check("out/itm/ot_plan_T", plan.swapaxes(1, 2))


def test_vilt(shared):
    """Without [CLS], [SEP] and the class token of the picture."""
    recorded = Recorded(shared / "goldens" / "vilt_dev.npz")
    words, patches = (
        jnp.array(recorded[f"out/mlm_itm_vqa/infer1/{name}_feats"]) for name in ("text", "image")
    )
    lengths = np.array(recorded.config["lens"])[:, None]
    places = np.arange(words.shape[1])
    word_mask = jnp.array((places > 0) & (places < lengths - 1))
    patch_mask = jnp.ones(patches.shape[:2], bool).at[:, 0].set(False)
    distance = transport_distance(words, patches, word_mask, patch_mask)
    labels = jnp.array(recorded["draw/itm_labels"] == 1)
    total, weight = signed_distance(distance, labels, jnp.ones(4, bool))
    np.testing.assert_allclose(
        0.1 * total / weight, recorded["loss/mlm_itm_vqa/itm_wpa"], rtol=0, atol=1e-6
    )
