"""Ask a model about a picture of one's own.

    python -m mmjax.predict CHECKPOINT --image=PHOTO --text="a dog" --text="a cat"
    python -m mmjax.predict CHECKPOINT --image=PHOTO --question="what is it?"
    python -m mmjax.predict CHECKPOINT --image=PHOTO --caption
    python -m mmjax.predict CHECKPOINT

CHECKPOINT is a Hugging Face folder, its Hub name (hf://owner/name), or one of our checkpoints
(WORKDIR, WORKDIR@STEP, WORKDIR@best). Without a picture, what the model can do is listed.
"""

import argparse
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.data.image import load_image
from mmjax.data.tokenizer import TextTokenizer
from mmjax.errors import InputError
from mmjax.models.model import Model
from mmjax.models.region_encoder import RegionConfig
from mmjax.processing import load_processor
from mmjax.training.checkpoints import load_assets
from mmjax.weights import load

# What families call their scores of one thing.
SIMILARITY = ("logits_per_image", "contrastive_logits_per_image")
MATCHING = ("itm_logits", "itm_score", "cross_relationship_score")
ANSWERS = ("vqa_logits", "question_answering_score", "logits")
SHOWN = 5


def main() -> int:
    """Parse the arguments and print the answer."""
    parser = argparse.ArgumentParser(
        prog="python -m mmjax.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("--image", metavar="PHOTO", help="a picture in any common format")
    parser.add_argument("--text", action="append", help="compare with it; may be given repeatedly")
    parser.add_argument("--question", help="answer it")
    parser.add_argument("--caption", action="store_true", help="describe the picture")
    try:
        print(predict(**vars(parser.parse_args())))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def predict(
    checkpoint: str,
    image: str | None = None,
    text: Sequence[str] | None = None,
    question: str | None = None,
    caption: bool = False,
) -> str:
    """The answer, as lines to print.

    Raises InputError where the checkpoint or the picture cannot be read, or the model cannot do
    what it is asked.
    """
    model = load(checkpoint)
    able = abilities(model)
    can = "\n".join(f"  {what}" for what in able.values()) or "  nothing with a picture from a file"
    if image is None:
        return f"This {type(model).__name__} can:\n{can}"
    asked = {"text": text, "question": question, "caption": caption}
    wanted = [flag for flag, value in asked.items() if value] or ["image"]
    for flag in wanted:
        if flag not in able:
            raise InputError(
                f"this {type(model).__name__} does nothing with --{flag}"
                f"{' alone' if flag == 'image' else ''}. It can:\n{can}"
            )
    inputs = Inputs.of(model, checkpoint)
    answers = {
        "text": lambda: _compare(model, inputs, image, list(text or ())),
        "question": lambda: _answer(model, inputs, image, question or ""),
        "caption": lambda: _describe(model, inputs, image),
        "image": lambda: _label(model, inputs, image),
    }
    return "\n".join(answers[flag]() for flag in wanted)


def abilities(model: Model) -> dict[str, str]:
    """What a model can do with a photograph, by the flag that asks for it."""
    reads_regions = isinstance(getattr(model.config, "image", None), RegionConfig)
    if reads_regions or "image" not in inspect.signature(model.forward).parameters:
        return {}  # it reads what a detector finds, or no pictures at all
    able = {}
    if _has(model, "contrastive"):
        able["text"] = "--text: compare the picture with texts"
    elif _has(model, "matching"):
        able["text"] = "--text: judge whether texts belong to the picture"
    if _has(model, "answering"):
        able["question"] = f"--question: choose one of {len(model.config.answers):,} answers"
    elif _has(model, "generate") and getattr(model.config, "decoder", "image") == "question":
        able["question"] = "--question: answer in words"
    if _has(model, "generate") and getattr(model.config, "decoder", "image") == "image":
        able["caption"] = "--caption: describe the picture"
    if _has(model, "classifier"):
        able["image"] = f"--image alone: choose one of {len(model.config.labels):,} labels"
    return able


def _has(model: Model, part: str) -> bool:
    return getattr(model, part, None) is not None


@dataclass(frozen=True)
class Inputs:
    """How a checkpoint wants its pictures and texts: both make parts of a batch."""

    pictures: Callable[[list[str]], dict[str, np.ndarray]]
    texts: Callable[[list[str]], dict[str, np.ndarray]]
    decode: Callable[[Any], Any]

    @classmethod
    def of(cls, model: Model, checkpoint: str) -> "Inputs":
        """From the processor beside the weights, or from a training run's config and tokenizer."""
        if model.family:
            processor = load_processor(checkpoint)
            return cls(
                pictures=lambda paths: processor(image=[Path(path) for path in paths]),
                texts=lambda texts: processor(text=texts),
                decode=processor.decode,
            )
        assets = load_assets(checkpoint)
        tokenizer = TextTokenizer.from_json(assets["tokenizer"])
        data = assets["config"]["data"]

        def pictures(paths: list[str]) -> dict[str, np.ndarray]:
            loaded = [load_image(Path(path), path, data["image_size"]) for path in paths]
            return {"image": np.stack(loaded)}

        def texts(texts: list[str]) -> dict[str, np.ndarray]:
            encoded = [tokenizer.encode(text, data["text_length"]) for text in texts]
            ids, masks = zip(*encoded, strict=True)
            return {"text": np.stack(ids), "text_mask": np.stack(masks)}

        return cls(pictures, texts, lambda ids: [tokenizer.decode(row) for row in ids])


def _compare(model: Any, inputs: Inputs, image: str, texts: list[str]) -> str:
    """A line a text: similarity among these texts, and whether it belongs to the picture."""
    out = model(**inputs.pictures([image] * len(texts)), **inputs.texts(texts))
    columns = {}
    for similarity in [out[name] for name in SIMILARITY if name in out]:
        logits = np.asarray(similarity[0])
        columns["score"] = [f"{score:.2f}" for score in logits]
        if len(texts) > 1:
            shares = np.asarray(jax.nn.softmax(jnp.asarray(logits)))
            columns["among these"] = [f"{100 * share:.1f} %" for share in shares]
    for matching in [out[name] for name in MATCHING if name in out]:
        belongs = np.asarray(jax.nn.softmax(matching))[:, 1]
        columns["belongs to it"] = [f"{100 * share:.1f} %" for share in belongs]
    titles = "  ".join(columns)
    rows = [
        "  ".join(cells[i].rjust(len(title)) for title, cells in columns.items()) + f"  {text}"
        for i, text in enumerate(texts)
    ]
    return "\n".join([titles, *rows])


def _answer(model: Any, inputs: Inputs, image: str, question: str) -> str:
    batch = inputs.pictures([image]) | inputs.texts([question])
    if not _has(model, "answering"):
        return inputs.decode(model.generate(**batch).tokens)[0]
    out = model(**batch)
    logits = next(out[name] for name in ANSWERS if name in out)
    return _best(logits[0], model.config.answers)


def _describe(model: Any, inputs: Inputs, image: str) -> str:
    return inputs.decode(model.generate(**inputs.pictures([image])).tokens)[0]


def _label(model: Any, inputs: Inputs, image: str) -> str:
    return _best(model(**inputs.pictures([image]))["logits"][0], model.config.labels)


def _best(logits: Any, names: Sequence[str]) -> str:
    """The likeliest names, a line each."""
    shares = np.asarray(jax.nn.softmax(jnp.asarray(logits)))
    best = np.argsort(-shares)[:SHOWN]
    return "\n".join(f"{100 * shares[i]:5.1f} %  {names[i]}" for i in best)


if __name__ == "__main__":
    sys.exit(main())
