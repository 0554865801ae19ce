import json

import numpy as np
import pytest

from mmjax.errors import InputError
from mmjax.evaluation import metrics


def rank_by_sorting(scores, positives):
    """Sort (worse score last, positives after their equals) and look for the first positive."""
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], positives[j]))
    return 1 + next(place for place, j in enumerate(order) if positives[j])


@pytest.mark.parametrize("levels", [3, 10_000])  # many ties, hardly any
def test_ranks_agree_with_sorting(levels):
    rng = np.random.default_rng(0)
    scores = rng.integers(0, levels, (60, 30)).astype(np.float32)
    positives = rng.random((60, 30)) < 0.1
    positives[np.arange(60), rng.integers(0, 30, 60)] = True
    expected = [rank_by_sorting(s, p) for s, p in zip(scores, positives, strict=True)]
    np.testing.assert_array_equal(metrics.retrieval_ranks(scores, positives), expected)


def test_ties_count_against_the_model():
    scores = np.array([[0.5, 0.5, 0.5], [0.9, 0.5, 0.5], [0.1, 0.5, 0.9]])
    np.testing.assert_array_equal(metrics.retrieval_ranks(scores, np.eye(3, dtype=bool)), [3, 3, 1])


def test_best_of_several_positives_counts_and_positives_do_not_push_each_other_back():
    scores = np.array([[0.9, 0.7, 0.8, 0.7, 0.1]])
    for positives, rank in (([1, 2], 2), ([1, 3], 3), ([0, 4], 1), ([4], 5)):
        mask = np.isin(np.arange(5), positives)[None]
        assert metrics.retrieval_ranks(scores, mask) == [rank]


def test_a_candidate_never_scored_ranks_last():
    scores = np.array([[0.2, -np.inf, 0.1], [0.2, -np.inf, -np.inf]])
    positives = np.array([[False, True, False], [False, True, False]])
    np.testing.assert_array_equal(metrics.retrieval_ranks(scores, positives), [3, 3])


def test_nan_and_a_query_without_positive_are_refused():
    scores = np.zeros((2, 2))
    with pytest.raises(InputError, match=r"1 of 2 queries .* first is query 1"):
        metrics.retrieval_ranks(scores, np.array([[True, False], [False, False]]))
    scores[1, 0] = np.nan
    with pytest.raises(InputError, match="1 of 4 scores are NaN"):
        metrics.retrieval_ranks(scores, np.eye(2, dtype=bool))
    with pytest.raises(ValueError, match=r"\(2, 2\) and \(2, 3\)"):
        metrics.retrieval_ranks(scores, np.ones((2, 3), bool))


def test_official_numbers(shared):
    folder = shared / "data" / "oracles" / "retrieval"
    expected = json.loads((folder / "retrieval_expected.json").read_text())["expected"]
    with np.load(folder / "retrieval_minilm_embeddings.npz") as arrays:
        scores = arrays["query"] @ arrays["captions"].T
    positives = np.arange(1000)[:, None] == np.arange(4000)[None] // 4

    ranks = metrics.retrieval_ranks(scores.T, positives.T)  # no ties in this direction
    official = expected["caption_to_query"]
    for k in (1, 5, 10):
        assert metrics.recall_at(ranks, k) == pytest.approx(official[f"R@{k}"])
    assert metrics.median_rank(ranks) == official["median_rank_1based"]
    assert ranks.mean() == pytest.approx(official["mean_rank_1based"])

    # Some pictures share a caption word for word. The official scorer lets chance decide these
    # ties, so its numbers lie between ours and those with every tie broken for the model.
    worst = metrics.retrieval_ranks(scores, positives)
    best = metrics.retrieval_ranks(scores + 1e-6 * positives, positives)
    official = expected["query_to_captions"]
    for k in (1, 5, 10):
        bounds = metrics.recall_at(worst, k), metrics.recall_at(best, k)
        assert bounds[0] - 1e-9 <= official[f"R@{k}"] <= bounds[1] + 1e-9
        assert bounds[1] - bounds[0] < 0.5
    assert metrics.median_rank(worst) == official["median_rank_1based"]
    assert best.mean() <= official["mean_rank_1based"] <= worst.mean()


def test_retrieval_metrics_are_named_and_have_units():
    named, units = metrics.retrieval_metrics(np.array([1, 2, 6, 11]), "image_to_text")
    assert named == {
        "retrieval/image_to_text/R@1": 25.0,
        "retrieval/image_to_text/R@5": 50.0,
        "retrieval/image_to_text/R@10": 75.0,
        "retrieval/median_rank/image_to_text": 4.0,
    }
    assert units.keys() == named.keys()
    assert units["retrieval/image_to_text/R@5"] == "percent"
    assert units["retrieval/median_rank/image_to_text"] == "count"
    reranked, _ = metrics.retrieval_metrics(np.array([1]), "text_to_image", reranked=True)
    assert set(reranked) == {
        "retrieval/reranked/text_to_image/R@1",
        "retrieval/reranked/text_to_image/R@5",
        "retrieval/reranked/text_to_image/R@10",
        "retrieval/reranked/median_rank/text_to_image",
    }
    with pytest.raises(InputError, match="no query"):
        metrics.retrieval_metrics(np.array([], int), "text_to_image")


@pytest.mark.parametrize("levels", [4, 10_000])
def test_roc_auc_agrees_with_counting_pairs(levels):
    rng = np.random.default_rng(1)
    labels = rng.random(200) < 0.3
    scores = rng.integers(0, levels, 200) + labels * levels / 5
    positive, negative = scores[labels][:, None], scores[~labels][None]
    expected = np.mean((positive > negative) + 0.5 * (positive == negative))
    assert metrics.roc_auc(scores, labels) == pytest.approx(expected, abs=1e-12)


def test_roc_auc_by_hand():
    labels = np.array([True, True, False, False])
    assert metrics.roc_auc(np.array([0.9, 0.8, 0.2, 0.1]), labels) == 1.0
    assert metrics.roc_auc(np.array([0.1, 0.2, 0.8, 0.9]), labels) == 0.0
    assert metrics.roc_auc(np.ones(4), labels) == 0.5
    with pytest.raises(InputError, match="found 2 and 0"):
        metrics.roc_auc(np.array([0.1, 0.2]), np.array([True, True]))
    with pytest.raises(InputError, match="NaN"):
        metrics.roc_auc(np.array([0.1, np.nan]), np.array([True, False]))


def test_soft_accuracy():
    predicted = ["red", "2", "yes", "no"]
    answers = [{"red": 1.0, "pink": 0.3}, {"two": 1.0}, {"yes": 0.6, "no": 0.9}, {"no": 0.9}]
    assert metrics.soft_accuracy(predicted, answers) == pytest.approx(100 * (1 + 0 + 0.6 + 0.9) / 4)
    by_type = metrics.soft_accuracy_by_type(
        predicted, answers, ["query", "count", "exist", "exist"]
    )
    assert by_type == pytest.approx({"count": 0.0, "exist": 75.0, "query": 100.0})
    assert list(by_type) == sorted(by_type)
    with pytest.raises(InputError, match="no question"):
        metrics.soft_accuracy([], [])
    with pytest.raises(ValueError, match="shorter"):
        metrics.soft_accuracy(["red"], [])
