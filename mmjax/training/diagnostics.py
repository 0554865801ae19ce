"""Warnings about runs that go nowhere while their loss looks plausible."""

from collections.abc import Mapping
from math import log


class MatchingPrior:
    """Image-text matching that has learnt nothing but how many pairs are true.

    With one true pair in three a constant answer has a loss of 0.6365 nats: a plateau that is easy
    to mistake for slow progress. Watches the mean over the last `window` steps, warns once.
    """

    def __init__(self, window: int = 500, tolerance: float = 0.01):
        self.window, self.tolerance = window, tolerance
        self.observed: list[tuple[int, float]] = []
        self.warned = False

    def observe(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """A warning, or None. `metrics` are those of one logged step."""
        if "matching/loss" not in metrics or self.warned:
            return None
        self.observed.append((step, metrics["matching/loss"]))
        prior = prior_loss(metrics["matching/positives"])
        recent = [loss for at, loss in self.observed if at > step - self.window]
        mean = sum(recent) / len(recent)
        if step - self.observed[0][0] < self.window or mean < prior - self.tolerance:
            return None
        self.warned = True
        return (
            f"the image-text matching loss has stood at {mean:.4f} for {self.window} steps: "
            f"{prior:.4f} is what answering by the share of true pairs alone costs, so the fusion "
            "has learnt nothing yet. Usual causes: too high a learning rate, embeddings that are "
            "still random, texts cut before they differ, or pictures that do not fit their texts. "
            "See docs/troubleshooting.md."
        )


def prior_loss(positives: float) -> float:
    """The entropy in nats of a yes/no with this share of yes: the loss of the best constant."""
    if not 0 < positives < 1:
        return 0.0
    return -positives * log(positives) - (1 - positives) * log(1 - positives)
