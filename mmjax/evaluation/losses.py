"""The training objectives on held-out data."""

from collections.abc import Callable, Mapping
from typing import Any

from mmjax.data.pipeline import Source
from mmjax.evaluation.encoding import Subject


def mean_losses(
    subject: Subject,
    eval_step: Callable[..., Any],
    source: Source,
    transform: Any,
    data: Mapping[str, Any],
) -> dict[str, float]:
    """Every loss and metric over one pass, each a sum over its weight: 'contrastive/loss', ….

    `eval_step(model, batch)` is that of `mmjax.training.step.make_eval_step`. The contrastive loss
    depends on the evaluation's batch size, which is the number of candidates.
    """
    sums: dict[str, tuple[float, float]] = {}
    for batch in subject.batches(source, transform, data):
        outputs = subject.run("losses", eval_step, batch)
        for name, (total, weight) in outputs.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + float(total), before[1] + float(weight))
    return {name: total / max(weight, 1e-9) for name, (total, weight) in sums.items()}
