"""The evaluations that a config asks for, on data that were opened once."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from mmjax.data import load_source, make_transform
from mmjax.data.pipeline import Source
from mmjax.errors import InputError
from mmjax.evaluation.answering import (
    Answers,
    answer_questions,
    answering_examples,
    score_answers,
    write_answers,
)
from mmjax.evaluation.encoding import Pictures, Subject, encode_gallery
from mmjax.evaluation.matching import attention_examples, matching_examples, score_matching
from mmjax.evaluation.report import Result
from mmjax.evaluation.retrieval import retrieval_examples, score_retrieval
from mmjax.models.fusion import FUSIONS
from mmjax.training.state import abstract_model

# The head of a model that an evaluation asks, and the key of `config.model` that adds it.
HEADS = {
    "retrieval": ("contrastive", "embedding_width"),
    "matching": ("matching", "matching"),
    "vqa": ("answering", "answers"),
}


def evaluation_data(evaluation: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """The training run's `data` with what the evaluation's own `data` sets, and always its size."""
    own = evaluation["data"]
    return {**data, **{key: value for key, value in own.items() if value}, "size": own["size"]}


@dataclass(frozen=True)
class Evaluation:
    """The evaluations that a config asks for, on data that were opened once.

    `config` is that of `mmjax.config.evaluation_config` (or `eval` of a training run), `data` the
    complete data config, `model` the model's.
    """

    config: Mapping[str, Any]
    data: Mapping[str, Any]
    model: Any
    source: Source

    @classmethod
    def open(cls, config: Mapping[str, Any], data: Mapping[str, Any], model: Any) -> "Evaluation":
        """Open the data; InputError where what is asked for and the data do not go together."""
        needed = {name for name in HEADS if config[name]["run"]}
        task = "questions" if needed == {"vqa"} else "captions"
        if "vqa" in needed and len(needed) > 1:
            raise InputError(
                "vqa needs questions, retrieval and matching need captions: evaluate them in two "
                "runs and merge the reports (python -m mmjax.evaluation.report --help)."
            )
        asked = {name: head for name, head in HEADS.items() if name in needed}
        if "retrieval" in needed and config["retrieval"]["rerank"]:
            asked["retrieval.rerank"] = HEADS["matching"]
        # The model and not its config, which need not have a field for every head that is built.
        heads = abstract_model(model) if asked else None
        for name, (head, key) in asked.items():
            if getattr(heads, head, None) is None:
                raise InputError(f"{name} needs a head that the model lacks: model.{key}.")
        data = {**data, "task": task if needed else data["task"]}
        return cls(config, data, model, load_source(data))

    @property
    def runs(self) -> bool:
        """Whether any evaluation is asked for."""
        return any(self.config[name]["run"] for name in HEADS)

    def score(
        self, subject: Subject, folder: Path | None = None, question_only: Subject | None = None
    ) -> Result:
        """Every score; with `folder`, examples too, their pictures saved there.

        `question_only` is a model trained without pictures, to stand beside the VQA score.
        """
        result = Result({}, {})
        if self.config["retrieval"]["run"] or self.config["matching"]["run"]:
            result = result.merge(self._captions(subject, folder))
        if self.config["vqa"]["run"]:
            result = result.merge(self._questions(subject, folder, question_only))
        return result

    def _captions(self, subject: Subject, folder: Path | None) -> Result:
        retrieval, matching = self.config["retrieval"], self.config["matching"]
        transform = make_transform(self.data, subject.tokenizer)
        gallery = encode_gallery(subject, self.source, transform, self.data, retrieval["captions"])
        pictures = None if folder is None else Pictures(folder, self.source, transform)
        result = Result({}, {})
        if retrieval["run"]:
            result = result.merge(score_retrieval(subject, gallery, retrieval))
            if pictures:
                examples = retrieval_examples(gallery, pictures, retrieval["examples"])
                result = result.merge(Result({}, {}, {"retrieval": examples}))
        if matching["run"]:
            scores, pairs = score_matching(subject, gallery, matching)
            result = result.merge(scores)
            if pictures:
                count = matching["examples"]
                drawn = {"matching": matching_examples(gallery, pairs, pictures, count)}
                grid = getattr(getattr(self.model, "image", None), "grid", None)
                if grid and self._has_attention():
                    drawn["attention"] = attention_examples(subject, gallery, pictures, grid, count)
                result = result.merge(Result({}, {}, drawn))
        return result

    def _has_attention(self) -> bool:
        """Whether words look at the picture in a fusion that can show where."""
        kind = getattr(getattr(self.model, "fusion", None), "kind", "none")
        return hasattr(FUSIONS[kind], "attention_maps")

    def _questions(
        self, subject: Subject, folder: Path | None, question_only: Subject | None
    ) -> Result:
        answers, transform = self._answers(subject)
        blind = None if question_only is None else self._answers(question_only)[0]
        result, records = score_answers(self.source, answers, blind)
        if folder is None:
            return result
        if jax.process_index() == 0:
            write_answers(folder / "answers.json", records, answers)
        pictures = Pictures(folder, self.source, transform)
        count = self.config["vqa"]["examples"]
        examples = answering_examples(records, answers, blind, pictures, count)
        return result.merge(Result({}, {}, {"vqa": examples}))

    def _answers(self, subject: Subject) -> tuple[Answers, Any]:
        names = self.model.answers
        transform = make_transform(
            self.data, subject.tokenizer, names, question_only=subject.question_only
        )
        return answer_questions(subject, self.source, transform, names, self.data), transform
