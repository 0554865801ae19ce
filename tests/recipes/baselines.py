"""What the best predictor reaches that never looks at its input, by objective.

Computed from the targets of one batch in plain numpy: entropies of what is to be guessed.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Batch = Mapping[str, np.ndarray]


def entropy(counts: Any) -> float:
    """In nats, of outcomes that came up so often."""
    p = np.asarray(counts, np.float64).ravel()
    p = p[p > 0] / p.sum()
    return float(-(p * np.log(p)).sum())


def _counts(values: np.ndarray) -> list[int]:
    return list(Counter(values.ravel().tolist()).values())


def candidates(batch: Batch) -> float:
    """Of a softmax over the batch."""
    return float(np.log(len(batch["index"])))


def pairs(batch: Batch) -> float:
    """Of a yes or no for each of B² pairs, B of them true, summed over a row."""
    rows = len(batch["index"])
    return rows * entropy([1 / rows, 1 - 1 / rows])


def one_in_three(batch: Batch) -> float:
    return entropy([1, 2])


def one_in_two(batch: Batch) -> float:
    return entropy([1, 1])


def words(batch: Batch) -> float:
    """Of a caption's words, without [CLS], which is never guessed."""
    text, mask = batch["text"][:, 1:], batch["text_mask"][:, 1:]
    return entropy(_counts(text[mask]))


def answer_words(batch: Batch) -> float:
    """Of a written answer, which is a sum over its words."""
    mask = batch["answer_text_mask"][..., 1:] & (batch["answer_weight"] > 0)[..., None]
    tokens = batch["answer_text"][..., 1:][mask]
    return entropy(_counts(tokens)) * mask.sum() / len(batch["index"])


def soft_answers(batch: Batch) -> float:
    """Of a yes or no for each answer."""
    return float(sum(entropy([p, 1 - p]) for p in batch["answer"].mean(axis=0)))


def answer_labels(batch: Batch) -> float:
    return entropy(_counts(batch["answer"].argmax(axis=-1)))


def of_regions(field: str) -> Callable[[Batch], float]:
    def baseline(batch: Batch) -> float:
        return entropy(_counts(batch[field][batch["region_mask"]]))

    return baseline


def region_variance(batch: Batch) -> float:
    """Of features, about their mean; half of it is what a smooth distance gives at most."""
    return float(batch["regions"][batch["region_mask"]].var(axis=0).mean())


def region_divergence(batch: Batch) -> float:
    """Of soft labels from their mean."""
    p = batch["region_distributions"][batch["region_mask"]].astype(np.float64)
    return float((p * (np.log(np.maximum(p, 1e-12)) - np.log(p.mean(axis=0)))).sum(axis=-1).mean())


def codes(batch: Batch) -> float:
    return entropy(_counts(batch["image_codes"]))


BASELINES: dict[str, Callable[[Batch], float]] = {
    "contrastive": candidates,
    "token_contrastive": candidates,
    "momentum_contrastive": candidates,
    "sigmoid_contrastive": pairs,
    "matching": one_in_three,
    "pairing": one_in_two,
    "labelled_pairing": one_in_two,
    "masked_language": words,
    "masked_language_alone": words,
    "captioning": words,
    "prefix_language": words,
    "answering": soft_answers,
    "answer_labels": answer_labels,
    "answer_generation": answer_words,
    "region_labels": of_regions("region_labels"),
    "region_attributes": of_regions("region_attributes"),
    "region_features": region_variance,
    "region_distributions": region_divergence,
    "masked_codes": codes,
    "masked_codes_alone": codes,
}
