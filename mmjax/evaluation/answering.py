"""Visual question answering, beside a model that never saw a picture."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from mmjax.data.pipeline import Source
from mmjax.errors import InputError
from mmjax.evaluation.encoding import Pictures, Subject
from mmjax.evaluation.metrics import soft_accuracy, soft_accuracy_by_type
from mmjax.evaluation.report import Result, write_atomically
from mmjax.models.model import taken


@dataclass(frozen=True)
class Answers:
    """A model's answers to the questions of a source: a probability for each of the list."""

    rows: np.ndarray  # of the source
    probabilities: Float[np.ndarray, "questions answers"]
    names: tuple[str, ...]

    @property
    def best(self) -> list[str]:
        """The answer given to each question."""
        return [self.names[column] for column in self.probabilities.argmax(axis=1)]

    def top(self, question: int, count: int) -> list[dict[str, Any]]:
        """The `count` most likely answers to one question."""
        order = np.argsort(-self.probabilities[question], kind="stable")[:count]
        return [
            {
                "answer": self.names[column],
                "confidence": float(self.probabilities[question, column]),
            }
            for column in order
        ]


def answer_questions(
    subject: Subject,
    source: Source,
    transform: Any,
    names: tuple[str, ...],
    data: Mapping[str, Any],
) -> Answers:
    """Answer every question whose picture can be read."""
    rows, probabilities = [], []
    for batch in subject.batches(source, transform, data):
        outputs = subject.run("answer", _answer, batch)
        rows.append(outputs["index"][outputs["valid"]])
        probabilities.append(outputs["probability"][outputs["valid"]])
    return Answers(np.concatenate(rows), np.concatenate(probabilities), names)


def score_answers(
    source: Source, answers: Answers, question_only: Answers | None
) -> tuple[Result, list[dict[str, Any]]]:
    """VQA accuracy, overall and by type of question, and that of a model that saw no pictures.

    Also returns the records that were answered, in the answers' order, without pixels.
    """
    records = []
    for row in answers.rows:
        record = dict(source[int(row)])
        record.pop("image")
        records.append(record)
    truth = [record["answers"] for record in records]
    types = [record["question_type"] for record in records]
    best = answers.best
    metrics = {
        "vqa/accuracy": soft_accuracy(best, truth),
        "vqa/questions": len(best),
        "vqa/bad_records": len(source) - len(best),
    }
    by_type = soft_accuracy_by_type(best, truth, types)
    metrics |= {f"vqa/accuracy/{kind}": accuracy for kind, accuracy in by_type.items()}
    if question_only is not None:
        lookup = dict(zip(question_only.rows.tolist(), question_only.best, strict=True))
        blind = [lookup[int(row)] for row in answers.rows]
        metrics["vqa/question_only_accuracy"] = soft_accuracy(blind, truth)
        by_type = soft_accuracy_by_type(blind, truth, types)
        metrics |= {f"vqa/question_only_accuracy/{kind}": a for kind, a in by_type.items()}
    counts = ("vqa/questions", "vqa/bad_records")
    units = {name: "count" if name in counts else "percent" for name in metrics}
    return Result(metrics, units), records  # type: ignore[arg-type]


def write_answers(path: Path, records: list[dict[str, Any]], answers: Answers) -> None:
    """Every answer as JSON, in the form that VQA's servers take, with its confidence."""
    rows = [
        {"question_id": record["question_id"], **answers.top(question, 1)[0]}
        for question, record in enumerate(records)
    ]
    write_atomically(path, json.dumps(rows, indent=0))


def answering_examples(
    records: list[dict[str, Any]],
    answers: Answers,
    question_only: Answers | None,
    pictures: Pictures,
    count: int,
) -> list[dict[str, Any]]:
    """`count` questions, spread over the source, with their answers."""
    examples = []
    chosen = np.linspace(0, len(answers.rows) - 1, min(count, len(answers.rows))).astype(int)
    for question in chosen.tolist():
        row = int(answers.rows[question])
        record, best = records[question], answers.best[question]
        example = {
            "picture": pictures(row),
            "question": record["question"],
            "question_type": record["question_type"],
            "answers": record["answers"],
            "predicted": answers.top(question, 3),
            "correct": record["answers"].get(best, 0.0) > 0,
        }
        if question_only is not None:
            blind = int(np.flatnonzero(question_only.rows == row)[0])
            example["question_only"] = question_only.top(blind, 1)
        examples.append(example)
    return examples


def _answer(model, batch):
    if getattr(model, "answering", None) is None:
        raise InputError("this model has no answering head: fine-tune it on questions first.")
    # By its phases, as objectives ask: what goes in and what comes out has other names elsewhere.
    image = model.encode_image(**taken(model.encode_image, batch))
    text = model.encode_text(**taken(model.encode_text, batch))
    return {
        "probability": jax.nn.sigmoid(model.score_answers(model.fuse(image, text))),
        "index": batch["index"],
        "valid": batch["valid"],
    }
