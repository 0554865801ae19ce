"""The warning about image-text matching that has learnt nothing."""

from math import log

import numpy as np
import pytest

from mmjax.training.diagnostics import MatchingPrior, prior_loss


def watch(losses, every=10, window=500, positives=1 / 3):
    """[(step, warning)] of the warnings over logged losses."""
    prior = MatchingPrior(window=window)
    seen = []
    for number, loss in enumerate(losses):
        step = (number + 1) * every
        message = prior.observe(step, {"matching/loss": loss, "matching/positives": positives})
        if message:
            seen.append((step, message))
    return seen


def test_the_prior_of_one_true_pair_in_three():
    np.testing.assert_allclose(prior_loss(1 / 3), 0.6365, atol=5e-5)
    np.testing.assert_allclose(prior_loss(0.5), log(2))
    assert prior_loss(0.0) == prior_loss(1.0) == 0.0


def test_a_loss_at_its_prior_is_told_once():
    noise = np.random.default_rng(0).normal(scale=0.005, size=300)
    seen = watch(0.6365 + noise)
    assert len(seen) == 1
    step, message = seen[0]
    assert 500 <= step <= 520
    assert "0.6365" in message
    assert "500 steps" in message


@pytest.mark.parametrize(
    "losses",
    [
        np.linspace(0.7, 0.2, 300),  # learns
        np.concatenate([np.full(40, 0.6365), np.linspace(0.63, 0.3, 260)]),  # after a while
        np.full(49, 0.6365),  # too short to tell
        np.full(300, 0.55),
    ],
    ids=["learns", "learns_late", "short", "below"],
)
def test_a_loss_that_falls_is_not(losses):
    assert watch(losses) == []


def test_a_loss_that_falls_and_comes_back_is_told():
    seen = watch(np.concatenate([np.full(60, 0.5), np.full(200, 0.637)]))
    assert len(seen) == 1
    assert seen[0][0] > 1000


def test_the_prior_follows_the_share_of_true_pairs():
    assert watch(np.full(100, 0.6365), positives=0.5) == []
    assert len(watch(np.full(100, log(2)), positives=0.5)) == 1


def test_runs_without_matching_are_left_alone():
    assert MatchingPrior().observe(1000, {"contrastive/loss": 3.0}) is None
