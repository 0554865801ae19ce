"""Sources -> examples -> batches."""

from collections.abc import Mapping
from typing import Any

from mmjax.data.flickr8k import Flickr8k
from mmjax.data.image import Augment
from mmjax.data.pipeline import CaptionExample, First, QuestionExample, Source, Transform
from mmjax.data.scenes import SceneQuestions, Scenes
from mmjax.data.tokenizer import TextTokenizer
from mmjax.errors import InputError, near_misses

TASKS = ("captions", "questions")
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
    kind = Scenes if data["task"] == "captions" else SceneQuestions
    every = TRAINING_SCENES if data["split"] == "train" else OTHER_SCENES
    return kind(data["split"], data["size"] or every, image_size=data["image_size"])


def _flickr8k(data: Mapping[str, Any]) -> Source:
    if data["task"] != "captions":
        raise InputError("Flickr8k has captions only: set data.task='captions'.")
    if not data["root"]:
        raise InputError("data.root is empty: give the folder of Flickr8k.")
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
    """What makes examples of the records of `load_source(data)`."""
    changes = Augment(crop_scale=data["crop_scale"], flip=data["flip"]) if augment else None
    if data["task"] == "captions":
        return CaptionExample(tokenizer, data["image_size"], data["text_length"], changes)
    return QuestionExample(
        tokenizer,
        answers,
        data["image_size"],
        data["text_length"],
        blind=question_only,
        augment=changes,
    )
