"""Warnings about runs that go nowhere while their loss looks plausible.

A symptom reads the metrics of the last steps and says what is wrong, if anything. What is wrong is
told once, with a hint and the section of docs/troubleshooting.md that bears the symptom's name.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping
from typing import ClassVar


class Recent:
    """The metrics of the last `window` steps, a row for each logged step."""

    def __init__(self, window: int):
        self.window, self.step = window, 0
        self._rows: deque[tuple[int, Mapping[str, float]]] = deque()
        self._first_step: int | None = None

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """The metrics of another logged step."""
        self._first_step = step if self._first_step is None else self._first_step
        self.step = step
        self._rows.append((step, metrics))
        while self._rows[0][0] <= step - self.window:
            self._rows.popleft()

    @property
    def complete(self) -> bool:
        """Whether a whole window has been seen."""
        return self._first_step is not None and self.step - self._first_step >= self.window

    def having(self, metric: str) -> list[str]:
        """Whose metric of this name is logged: what stands before it, as an objective."""
        ending = f"/{metric}"
        return [name.removesuffix(ending) for name in self._rows[-1][1] if name.endswith(ending)]

    def now(self, metric: str) -> float:
        """The last value."""
        return self._rows[-1][1][metric]

    def mean(self, metric: str) -> float:
        """The mean over the window."""
        return self._mean(metric, len(self._rows))

    def lowest(self, metric: str) -> float:
        """The mean over the window or over its last fifth: the lower of them."""
        return min(self.mean(metric), self._mean(metric, max(len(self._rows) // 5, 1)))

    def highest(self, metric: str) -> float:
        """The mean over the window or over its last fifth: the higher of them."""
        return max(self.mean(metric), self._mean(metric, max(len(self._rows) // 5, 1)))

    def _mean(self, metric: str, count: int) -> float:
        rows = list(self._rows)[-count:]
        return sum(metrics[metric] for _, metrics in rows) / count


class Symptom:
    """Something that is wrong with a run, as far as its metrics tell."""

    # Of the metric `train/warnings/NAME`, and of the section in docs/troubleshooting.md.
    name: ClassVar[str]
    hint: ClassVar[str]  # the usual causes, or what to do first

    def seen(self, recent: Recent) -> Iterator[tuple[str, str]]:
        """Every (subject, what is wrong with it): objectives, parameters and the like.

        What has just begun to change for the better is not wrong any more: hence `lowest` and
        `highest`.
        """
        raise NotImplementedError


class MatchingPrior(Symptom):
    """Image-text matching that has learnt nothing but how many pairs are true.

    With one true pair in three a constant answer has a loss of 0.6365 nats: a plateau that is easy
    to mistake for slow progress.
    """

    name = "matching_prior"
    hint = (
        "Usual causes: too high a learning rate, embeddings that are still random, texts cut "
        "before they differ, or pictures that do not fit their texts."
    )
    TOLERANCE = 0.01  # nats

    def seen(self, recent: Recent) -> Iterator[tuple[str, str]]:
        """The cross-entropy is at least the entropy of true and false."""
        for objective in recent.having("positives"):
            loss = f"{objective}/cross_entropy"
            prior = prior_loss(recent.mean(f"{objective}/positives"))
            if recent.lowest(loss) >= prior - self.TOLERANCE:
                yield (
                    objective,
                    f"The {objective} loss has stood at {recent.mean(loss):.4f} for "
                    f"{recent.window} steps: {prior:.4f} is what answering by the share of true "
                    "pairs alone costs, so the fusion has learnt nothing yet.",
                )


class MaskedLanguageUnigram(Symptom):
    """Masked words that are guessed by their frequency alone.

    Held against accuracies, not losses: the entropy of thousands of words cannot be told from a
    batch, a tenth of the masked words is in plain sight, and a distilled loss has another scale.
    """

    name = "masked_language_unigram"
    hint = (
        "Usual causes: too high a learning rate, too many words masked, or a vocabulary other than "
        "the one that the text encoder was trained with."
    )
    TOLERANCE = 1.05  # one word more in twenty is no progress yet

    def seen(self, recent: Recent) -> Iterator[tuple[str, str]]:
        """No more words are right than without a look at the picture and the other words."""
        for objective in recent.having("unigram_accuracy"):
            accuracy, unigram = f"{objective}/accuracy", f"{objective}/unigram_accuracy"
            if recent.highest(accuracy) <= self.TOLERANCE * recent.mean(unigram):
                yield (
                    objective,
                    f"{recent.mean(accuracy):.1%} of the guesses of {objective} were right in the "
                    f"last {recent.window} steps, and {recent.mean(unigram):.1%} would be by the "
                    "frequency of words alone: neither picture nor text has helped yet.",
                )


class Collapsed(Symptom):
    """Embeddings that hardly depend on what is embedded, or on few of its traits.

    All near one point: the uniformity is near 0, whatever the batch and the width. Spread over few
    directions: the effective rank is a small share of what it could be.
    """

    name = "collapsed"
    hint = (
        "Usual causes: too high a learning rate, pictures or texts that are all the same, or a "
        "loss without negatives."
    )
    UNIFORMITY = -0.1  # reached by vectors whose cosines are 0.975
    RANK = 0.05  # of min(rows, width)

    def seen(self, recent: Recent) -> Iterator[tuple[str, str]]:
        """The uniformity is high or the effective rank low."""
        for kind in recent.having("effective_rank"):
            uniformity, rank = f"{kind}/uniformity", f"{kind}/effective_rank"
            to_a_point = recent.lowest(uniformity) > self.UNIFORMITY
            if to_a_point or recent.highest(rank) < self.RANK:
                where = "a point" if to_a_point else "few directions"
                yield (
                    kind,
                    f"The {kind} have collapsed to {where}: over the last {recent.window} steps "
                    f"their uniformity was {recent.mean(uniformity):.3f}, and their effective rank "
                    f"{recent.mean(rank):.1%} of what it could be.",
                )


class LogitScaleBound(Symptom):
    """A temperature, or another bounded parameter, that would go on if it could."""

    name = "logit_scale_bound"
    hint = (
        "optimizer.bounds sets its bounds. A temperature at the sharp end is often that of a model "
        "that knows its few pairs by heart; at the flat end, of one that cannot tell pairs apart."
    )
    SHARE = 0.5  # of the steps: noise takes it off the bound now and then

    def seen(self, recent: Recent) -> Iterator[tuple[str, str]]:
        """It sits there in most steps."""
        for side in ("lower", "upper"):
            for parameter in recent.having(f"at_{side}_bound"):
                share = f"{parameter}/at_{side}_bound"
                if recent.lowest(share) > self.SHARE:
                    yield (
                        f"{parameter} {side}",
                        f"{parameter} sat at its {side} bound in {recent.mean(share):.0%} of the "
                        f"last {recent.window} steps.",
                    )


class TeacherIdentical(Symptom):
    """A teacher that cannot teach: its parameters are the student's."""

    name = "teacher_identical"
    hint = "Usual causes: a learning rate of 0, everything frozen, an optimizer.ema_decay near 0."
    TEACHERS = ("average", "reference")
    DISTANCE = 1e-6  # relative: a few roundings of float32

    def seen(self, recent: Recent) -> Iterator[tuple[str, str]]:
        """Their parameters differ by no more than roundings."""
        logged = recent.having("distance")
        for teacher in (teacher for teacher in self.TEACHERS if teacher in logged):
            if recent.highest(f"{teacher}/distance") < self.DISTANCE:
                yield (
                    teacher,
                    f"The teacher ({teacher}) and its student have been identical for "
                    f"{recent.window} steps: there is nothing to learn from it.",
                )


class QueueInitial(Symptom):
    """A queue of earlier embeddings that is still partly as it started: empty."""

    name = "queue_initial"
    hint = "A shorter queue or a larger batch is filled sooner."

    def seen(self, recent: Recent) -> Iterator[tuple[str, str]]:
        """It is not full after a whole window."""
        for objective in recent.having("queue_filled"):
            filled = recent.now(f"{objective}/queue_filled")
            if filled < 1:
                steps = f"about {recent.step / filled:,.0f}" if filled else "no number of"
                yield (
                    objective,
                    f"{filled:.1%} of the queue of {objective} is filled after {recent.step:,} "
                    f"steps, and the rest holds its initial values: it takes {steps} steps.",
                )


SYMPTOMS: tuple[Symptom, ...] = (
    MatchingPrior(),
    MaskedLanguageUnigram(),
    Collapsed(),
    LogitScaleBound(),
    TeacherIdentical(),
    QueueInitial(),
)


class Diagnosis:
    """Looks for every symptom at every logged step, from `window` steps after the warm-up on."""

    def __init__(self, window: int, warmup_steps: int = 0):
        self._recent, self._warmup_steps = Recent(window), warmup_steps
        self._told: set[tuple[str, str]] = set()
        self.metrics: dict[str, float] = {}

    def observe(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """The warnings that were not given before.

        Afterwards `self.metrics` has `warnings/NAME` of every symptom seen so far: 1 while it
        lasts, 0 when it is over.
        """
        if step <= self._warmup_steps:
            return []
        self._recent.add(step, metrics)
        if not self._recent.complete:
            return []
        warnings = []
        self.metrics = dict.fromkeys(self.metrics, 0.0)
        for symptom in SYMPTOMS:
            for subject, sentence in symptom.seen(self._recent):
                self.metrics[f"warnings/{symptom.name}"] = 1.0
                if (symptom.name, subject) not in self._told:
                    self._told.add((symptom.name, subject))
                    section = f"docs/troubleshooting.md#{symptom.name}"
                    warnings.append(f"{sentence} {symptom.hint} See {section}.")
        return warnings


def prior_loss(positives: float) -> float:
    """The entropy in nats of a yes/no with this share of yes: the loss of the best constant."""
    if not 0 < positives < 1:
        return 0.0
    return -positives * math.log(positives) - (1 - positives) * math.log(1 - positives)
