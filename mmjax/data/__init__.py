"""Sources -> examples -> batches."""

from collections.abc import Mapping
from typing import Any

from mmjax.data.flickr8k import Flickr8k
from mmjax.data.image import Augment
from mmjax.data.pipeline import CaptionExample, QuestionExample, Source, Transform
from mmjax.data.scenes import SceneQuestions, Scenes
from mmjax.data.tokenizer import TextTokenizer
from mmjax.errors import InputError, near_misses

SOURCES = ("scenes", "flickr8k")
TASKS = ("captions", "questions")


def load_source(data: Mapping[str, Any]) -> Source:
    """The records that `config.data` names.

    Raises InputError for an unknown source or task, a source without that task, and whatever the
    source finds wrong with its files.
    """
    source, task = data["source"], data["task"]
    if task not in TASKS:
        raise InputError(f"data.task is {task!r}.{near_misses(task, TASKS)}")
    if source == "scenes":
        kind = Scenes if task == "captions" else SceneQuestions
        return kind(data["split"], data["size"], image_size=data["image_size"])
    if source == "flickr8k":
        if task != "captions":
            raise InputError("Flickr8k has captions only: set data.task='captions'.")
        if not data["root"]:
            raise InputError("data.root is empty: give the folder of Flickr8k.")
        return Flickr8k(data["root"], data["split"])
    raise InputError(f"data.source is {source!r}.{near_misses(source, SOURCES)}")


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
