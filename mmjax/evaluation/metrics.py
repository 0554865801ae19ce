"""What a score is: ranks, recall, ROC-AUC and soft accuracy, in plain numpy.

Names of metrics have slashes (`retrieval/image_to_text/R@1`), and every metric has a unit:
`percent` (0 to 100), `fraction` (0 to 1) or `count`.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from mmjax.errors import InputError

Unit = Literal["percent", "fraction", "count"]
Direction = Literal["image_to_text", "text_to_image"]


def retrieval_ranks(
    scores: Float[np.ndarray, "queries gallery"], positives: Bool[np.ndarray, "queries gallery"]
) -> Int[np.ndarray, " queries"]:
    """The rank of each query's best positive, counted from 1.

    Ties count against the model: a wrong candidate that scores the same stands before the right
    one, so that a collapsed model, which scores everything alike, comes out last and not first.

    Raises:
      InputError: a score is NaN, or a query has no positive in the gallery.
    """
    if scores.ndim != 2 or scores.shape != positives.shape:
        raise ValueError(
            f"scores and positives must both be [queries, gallery], found {scores.shape} and "
            f"{positives.shape}"
        )
    _refuse_nan(scores)
    alone = np.flatnonzero(~positives.any(axis=1))
    if alone.size:
        raise InputError(
            f"{alone.size} of {len(scores)} queries have no positive in the gallery, the first is "
            f"query {alone[0]}: leave them out, or add what they should find"
        )
    best = np.where(positives, scores, -np.inf).max(axis=1, keepdims=True)
    return 1 + np.count_nonzero((scores >= best) & ~positives, axis=1)


def recall_at(ranks: Int[np.ndarray, " queries"], k: int) -> float:
    """R@k in percent: the share of queries whose best positive is among the first `k`."""
    return 100 * float(np.mean(ranks <= k))


def median_rank(ranks: Int[np.ndarray, " queries"]) -> float:
    """The median rank, a count from 1 (half a rank lies between two middle queries)."""
    return float(np.median(ranks))


def retrieval_metrics(
    ranks: Int[np.ndarray, " queries"], direction: Direction, *, reranked: bool = False
) -> tuple[dict[str, float], dict[str, Unit]]:
    """R@1, R@5, R@10 and the median rank of one direction, named, and their units.

    The names are `retrieval/DIRECTION/R@k` and `retrieval/median_rank/DIRECTION`;
    with `reranked`, the same under `retrieval/reranked/`.
    """
    if not len(ranks):
        raise InputError(f"retrieval {direction}: there is no query to score; is the data empty?")
    prefix = "retrieval/reranked" if reranked else "retrieval"
    metrics = {f"{prefix}/{direction}/R@{k}": recall_at(ranks, k) for k in (1, 5, 10)}
    units: dict[str, Unit] = dict.fromkeys(metrics, "percent")
    metrics[f"{prefix}/median_rank/{direction}"] = median_rank(ranks)
    units[f"{prefix}/median_rank/{direction}"] = "count"
    return metrics, units


def roc_auc(scores: Float[np.ndarray, " pairs"], labels: Bool[np.ndarray, " pairs"]) -> float:
    """The area under the ROC curve, a fraction: how often a positive outscores a negative.

    Ties count half. Computed from midranks (the Mann-Whitney statistic).

    Raises:
      InputError: a score is NaN, or all labels are the same.
    """
    labels = np.asarray(labels, bool)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(f"scores and labels must be [pairs]: {scores.shape}, {labels.shape}")
    _refuse_nan(scores)
    n_positive = int(labels.sum())
    n_negative = len(labels) - n_positive
    if not n_positive or not n_negative:
        raise InputError(
            f"ROC-AUC needs positives and negatives, found {n_positive} and {n_negative}"
        )
    _, level, size = np.unique(scores, return_inverse=True, return_counts=True)
    midrank = np.cumsum(size) - (size - 1) / 2
    wins = midrank[level][labels].sum() - n_positive * (n_positive + 1) / 2
    return float(wins / (n_positive * n_negative))


def soft_accuracy(predicted: Sequence[str], answers: Sequence[Mapping[str, float]]) -> float:
    """VQA accuracy in percent: the mean soft score (0 to 1) of the predicted answers.

    Args:
      predicted: one answer per question.
      answers: per question the soft score of every accepted answer; others score 0
        (VQA, Antol et al. 2015, section 3.3 for the score).
    """
    if not predicted:
        raise InputError("there is no question to score; is the data empty?")
    pairs = zip(predicted, answers, strict=True)
    return 100 * float(np.mean([accepted.get(answer, 0.0) for answer, accepted in pairs]))


def soft_accuracy_by_type(
    predicted: Sequence[str],
    answers: Sequence[Mapping[str, float]],
    question_types: Sequence[str],
) -> dict[str, float]:
    """`soft_accuracy` of each question type by itself, in percent, the types sorted."""
    rows: dict[str, list[tuple[str, Mapping[str, float]]]] = {}
    for answer, accepted, kind in zip(predicted, answers, question_types, strict=True):
        rows.setdefault(kind, []).append((answer, accepted))
    return {
        kind: soft_accuracy([answer for answer, _ in of_kind], [a for _, a in of_kind])
        for kind, of_kind in sorted(rows.items())
    }


def _refuse_nan(scores: Float[np.ndarray, "..."]) -> None:
    bad = int(np.isnan(scores).sum())
    if bad:
        raise InputError(
            f"{bad} of {scores.size} scores are NaN, so nothing can be ranked: the checkpoint's "
            "parameters have probably diverged; score an earlier checkpoint, or train again with "
            "a lower learning rate"
        )
