"""Warnings about runs that go nowhere while their loss looks plausible."""

from collections import deque
from collections.abc import Mapping
from math import log


class MatchingPrior:
    """Image-text matching that has learnt nothing but how many pairs are true.

    With one true pair in three a constant answer has a loss of 0.6365 nats: a plateau that is easy
    to mistake for slow progress. Watches the mean over the last `window` steps, warns once.
    """

    def __init__(self, window: int = 500, tolerance: float = 0.01):
        self.window, self.tolerance = window, tolerance
        self._recent: deque[tuple[int, float]] = deque()
        self._first_step: int | None = None
        self.warned = False

    def observe(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """A warning, or None. `metrics` are those of one logged step."""
        if "matching/loss" not in metrics or self.warned:
            return None
        self._first_step = step if self._first_step is None else self._first_step
        self._recent.append((step, metrics["matching/loss"]))
        while self._recent[0][0] <= step - self.window:
            self._recent.popleft()
        losses = [loss for _, loss in self._recent]
        # A loss that comes down from above its prior, or has just left it, is on its way.
        latest = losses[-max(len(losses) // 5, 1) :]
        mean = sum(losses) / len(losses)
        prior = prior_loss(metrics["matching/positives"])
        at_prior = min(mean, sum(latest) / len(latest)) >= prior - self.tolerance
        if step - self._first_step < self.window or not at_prior:
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
