"""Sources -> examples -> batches."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.data.examples import CaptionExample, QuestionExample, StatementExample
from mmjax.data.flickr8k import Flickr8k
from mmjax.data.image import Augment
from mmjax.data.pipeline import First, Source, Transform
from mmjax.data.scenes import SceneQuestions, Scenes, SceneStatements, blank_regions
from mmjax.data.tokenizer import TextTokenizer
from mmjax.errors import InputError, near_misses

TASKS = ("captions", "questions", "statements")
# Scenes are drawn, so "all" of them is a choice.
TRAINING_SCENES, OTHER_SCENES = 20_000, 1_000


def load_source(data: Mapping[str, Any]) -> Source:
    """The records that `config.data` names; the first `data.size` of them, where it is not 0.

    Raises InputError for an unknown source or task, a source without that task, and whatever the
    source finds wrong with its files.
    """
    if data["task"] not in TASKS:
        raise InputError(f"data.task is {data['task']!r}.{near_misses(data['task'], TASKS)}")
    if data["source"] not in SOURCES:
        raise InputError(
            f"data.source is {data['source']!r}.{near_misses(data['source'], SOURCES)}"
        )
    source = SOURCES[data["source"]](data)
    return First(source, data["size"]) if 0 < data["size"] < len(source) else source


def _scenes(data: Mapping[str, Any]) -> Source:
    kind = {"captions": Scenes, "questions": SceneQuestions, "statements": SceneStatements}
    every = TRAINING_SCENES if data["split"] == "train" else OTHER_SCENES
    return kind[data["task"]](
        data["split"],
        data["size"] or every,
        image_size=data["image_size"],
        regions=data["regions"] or data["tags"],
        code_grid=data["code_grid"],
    )


def _flickr8k(data: Mapping[str, Any]) -> Source:
    if data["task"] != "captions":
        raise InputError("Flickr8k has captions only: set data.task='captions'.")
    if not data["root"]:
        raise InputError("data.root is empty: give the folder of Flickr8k.")
    for key in ("regions", "tags", "code_grid"):
        if data[key]:
            raise InputError(
                f"data.{key} is {data[key]}, and Flickr8k has pictures and captions alone: take "
                f"data.source='scenes', or set data.{key} to {type(data[key])()}."
            )
    return Flickr8k(data["root"], data["split"])


# A new data set is a class with the methods of `Source`, and a line here.
SOURCES = {"scenes": _scenes, "flickr8k": _flickr8k}


def make_transform(
    data: Mapping[str, Any],
    tokenizer: TextTokenizer,
    answers: tuple[str, ...] = (),
    *,
    augment: bool = False,
    question_only: bool = False,
) -> Transform:
    """What makes examples of the records of `load_source(data)`.

    Raises InputError where two keys of `data` cannot go together.
    """
    _check_second_text(data)
    shared: dict[str, Any] = {
        "tokenizer": tokenizer,
        "image_size": data["image_size"],
        "text_length": data["text_length"],
        "augment": _changes(data) if augment else None,
        "arrays": _blank_arrays(data),
        "tags": data["tags"],
    }
    if data["task"] == "captions":
        return CaptionExample(
            **shared,
            prompt=data["prompt"].strip(),
            second_caption=data["second_caption"],
            others=load_source(data) if data["second_caption"] or data["false_tags"] else None,
        )
    if data["task"] == "statements":
        return StatementExample(**shared, blind=question_only)
    return QuestionExample(
        **shared,
        blind=question_only,
        answers=answers,
        answer_length=data["answer_length"],
        answer_count=data["answer_count"],
    )


def _check_second_text(data: Mapping[str, Any]) -> None:
    if data["tags"] and data["second_caption"]:
        raise InputError(
            "data.tags and data.second_caption are both set, and a text has two parts: its caption "
            "and one of these. Set one of them to False."
        )
    if data["false_tags"] and not data["tags"]:
        raise InputError("data.false_tags is set, and there are no tags: set data.tags=True.")


def _changes(data: Mapping[str, Any]) -> Augment:
    changes = Augment(data["crop_scale"], data["flip"], tuple(data["randaugment"]))
    if changes.moves and (data["regions"] or data["code_grid"]):
        key = "regions" if data["regions"] else "code_grid"
        raise InputError(
            f"data.{key} says where things lie in the picture as it is, and they are moved: set "
            "data.crop_scale=1.0, data.flip=False and data.randaugment=(0, 0)."
        )
    return changes


def _blank_arrays(data: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays that records are to bring, as they are where there is no picture."""
    arrays = blank_regions() if data["regions"] else {}
    if data["code_grid"]:
        arrays["image_codes"] = np.zeros(data["code_grid"] ** 2, np.int32)
    return arrays
