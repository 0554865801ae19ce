"""Encoding a captions source once, and scoring pairs of what was encoded."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from mmjax.data.pipeline import Batch, EveryCaption, Source, TextExample, evaluation_batches
from mmjax.data.tokenizer import TextTokenizer
from mmjax.errors import InputError
from mmjax.evaluation.report import save_picture
from mmjax.models import Encoded
from mmjax.models.model import taken
from mmjax.sharding import replicated, to_device


@dataclass(frozen=True)
class Subject:
    """A model under evaluation: its structure, its parameters, and how its inputs are made."""

    graph: nnx.GraphDef
    params: Any
    mesh: Mesh
    tokenizer: TextTokenizer
    batch_size: int
    question_only: bool  # it was trained on grey pictures, and is scored on them
    compiled: dict[str, Callable[..., Any]]  # shared between evaluations of the same structure

    def run(
        self, name: str, function: Callable[..., Any], *batch: Mapping[str, np.ndarray] | Any
    ) -> Any:
        """`function(model, *inputs)` on the devices, its outputs whole, as numpy.

        `name` is the key under which the compiled program is kept.
        """
        if name not in self.compiled:
            self.compiled[name] = jax.jit(
                lambda params, *inputs: function(nnx.merge(self.graph, params), *inputs),
                out_shardings=replicated(self.mesh),
            )
        inputs = (to_device(part, self.mesh) for part in batch)
        return jax.tree.map(np.asarray, self.compiled[name](self.params, *inputs))

    def batches(self, source: Source, transform: Any, data: Mapping[str, Any]) -> Iterator[Batch]:
        """This process's rows of one pass over a source; `data` says how to read it."""
        batches = evaluation_batches(
            source,
            transform,
            batch_size=self.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            on_bad_record=data["on_bad_record"],
            threads=data["threads"],
            workers=data["workers"],
        )
        try:
            yield from batches
        finally:
            batches.close()


@dataclass(frozen=True)
class Pictures:
    """Saves the pictures that a report shows, as the model sees them, when they are asked for."""

    folder: Path
    source: Source
    transform: Any

    def __call__(self, row: int) -> str:
        """The path, relative to the report, of the picture of the source's row."""
        name = f"row-{row}"
        path = self.folder / "pictures" / f"{name}.png"
        if jax.process_index() == 0 and not path.exists():
            save_picture(self.folder, self.transform(self.source[row], None)["image"], name)
        return path.relative_to(self.folder).as_posix()


@dataclass(frozen=True)
class Gallery:
    """Every picture and every caption of a source, encoded; arrays in host memory."""

    image: Encoded
    image_embedding: Float[np.ndarray, "pictures embedding"]
    image_id: Int[np.ndarray, " pictures"]
    image_row: Int[np.ndarray, " pictures"]  # of the source
    text: Encoded
    text_embedding: Float[np.ndarray, "captions embedding"]
    text_id: Int[np.ndarray, " captions"]  # the picture a caption belongs to
    captions: list[str]
    bad_records: int

    @property
    def similarity(self) -> Float[np.ndarray, "pictures captions"]:
        """Cosine similarities."""
        return self.image_embedding @ self.text_embedding.T

    @property
    def positives(self) -> Bool[np.ndarray, "pictures captions"]:
        """Which caption belongs to which picture."""
        return self.image_id[:, None] == self.text_id[None, :]


def encode_gallery(
    subject: Subject, source: Source, transform: Any, data: Mapping[str, Any], captions: int = 0
) -> Gallery:
    """Encode all pictures of a source and its captions (the first `captions` of each; 0: all).

    `data` is the data config: the length of texts, and how to read.
    A picture that cannot be read is left out, its captions with it, and counted.
    """
    batches = subject.batches(source, transform, data)
    pictures = _encode(subject, "encode_image", _encode_image, batches)
    texts = EveryCaption(source, captions)
    words = _encode(
        subject,
        "encode_text",
        _encode_text,
        subject.batches(texts, TextExample(subject.tokenizer, data["text_length"]), data),
    )
    readable = np.isin(words["image_id"], pictures["image_id"])
    words = jax.tree.map(lambda array: array[readable], words)
    if not len(pictures["image_id"]):
        raise InputError("not one picture of the evaluation data could be read.")
    return Gallery(
        image=pictures["encoded"],
        image_embedding=pictures["embedding"],
        image_id=pictures["image_id"],
        image_row=pictures["index"],
        text=words["encoded"],
        text_embedding=words["embedding"],
        text_id=words["image_id"],
        captions=[texts[int(row)]["captions"][0] for row in words["index"]],
        bad_records=len(source) - len(pictures["image_id"]),
    )


def match_pairs(
    subject: Subject,
    gallery: Gallery,
    images: Int[np.ndarray, " pairs"],
    texts: Int[np.ndarray, " pairs"],
) -> Float[np.ndarray, " pairs"]:
    """The log-odds that picture `images[i]` and caption `texts[i]` of the gallery match."""
    if subject.batch_size % jax.process_count():
        raise InputError("the evaluation's batch_size must be a multiple of the process count.")
    scores = []
    for start in range(0, len(images), subject.batch_size):
        rows = slice(start, start + subject.batch_size)
        padding = subject.batch_size - len(images[rows])
        image_rows, text_rows = (np.pad(x[rows], (0, padding)) for x in (images, texts))
        mine = np.array_split(np.arange(subject.batch_size), jax.process_count())[
            jax.process_index()
        ]
        pair = {
            "image": gallery.image.take(image_rows[mine]),
            "text": gallery.text.take(text_rows[mine]),
        }
        scores.append(subject.run("match", _match, pair)[: subject.batch_size - padding])
    return np.concatenate(scores) if scores else np.zeros(0, np.float32)


def _encode(
    subject: Subject,
    name: str,
    function: Callable[..., Any],
    batches: Iterator[Batch],
) -> dict[str, Any]:
    """The outputs of `function` over all batches, valid rows only, with what identifies them."""
    parts = []
    for batch in batches:
        outputs = subject.run(name, function, batch)
        valid = outputs.pop("valid")
        parts.append(jax.tree.map(lambda array, valid=valid: array[valid], outputs))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def _encode_image(model, batch):
    encoded = model.encode_image(**taken(model.encode_image, batch))
    return _encoded(model, batch, encoded, "embed_image")


def _encode_text(model, batch):
    encoded = model.encode_text(**taken(model.encode_text, batch))
    return _encoded(model, batch, encoded, "embed_text")


def _encoded(model, batch, encoded, embed):
    # Without a contrastive head pairs can be matched, if not retrieved: vectors of no width.
    has_space = getattr(model, "contrastive", None) is not None
    vectors = getattr(model, embed)(encoded) if has_space else encoded.pooled[:, :0]
    return {**_identity(batch), "encoded": encoded, "embedding": vectors}


def _identity(batch):
    return {key: batch[key] for key in ("image_id", "index", "valid")}


def _match(model, pair):
    if getattr(model, "matching", None) is None:
        raise InputError("this model has no image-text matching head; it cannot judge pairs.")
    logits = model.match(model.fuse(pair["image"], pair["text"]))
    return jnp.asarray(logits[:, 1] - logits[:, 0], jnp.float32)
