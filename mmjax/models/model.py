"""What every whole model has in common: named inputs in, named outputs out."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from mmjax.errors import InputError, near_misses
from mmjax.models.features import Encoded, Fused, mask_of

Moves = tuple[tuple[str, str], ...]


class Model(nnx.Module):
    """Call it with the fields of a batch by name; it answers with a dict of outputs by name.

    Inputs are named as in a batch (`docs/models.md` lists them): `image [B,H,W,3]` (float and
    already normalised, or uint8), `text [B,L]`, `text_mask [B,L]`, `regions [B,R,F]`, …; outputs as
    Hugging Face names them. A family defines `forward`, whose parameters are what it can take.
    """

    config: Any
    forward: Callable[..., dict[str, Any]]  # the outputs of one batch; `key=None`: no dropout
    # Where a part of public weights goes (`init_from.PART`) that has another place here: pairs of
    # paths, there and here, see `mmjax.training.initialisation.placed`.
    adopts: ClassVar[Mapping[str, Moves]] = {}
    family = ""  # whose names it was loaded under, if it was; `mmjax.save_huggingface` writes them

    def __call__(
        self, *, train: bool = False, key: Key[jax.Array, ""] | None = None, **inputs: Any
    ) -> dict[str, Any]:
        """All that the model has to say of a batch.

        With `train=True` dropout is drawn from `key`; without, nothing is random. Compiled anew for
        inputs of another shape: pad texts, regions and pictures to few sizes.

        Raises InputError where an input is unknown or missing.
        """
        if train != (key is not None):
            raise InputError("train=True draws dropout from a key: give both, or neither.")
        parameters = dict(inspect.signature(self.forward).parameters)
        parameters.pop("key", None)
        name = type(self).__name__
        for unknown in inputs.keys() - parameters.keys():
            raise InputError(
                f"{name} takes no input {unknown!r}.{near_misses(unknown, parameters)}"
            )
        _require(name, parameters, inputs)
        arrays = {
            name: value if value is None or isinstance(value, jax.Array) else np.asarray(value)
            for name, value in inputs.items()
        }
        for name, array in arrays.items():
            _check(name, array)
        return _forward(*nnx.split(self), arrays, key)

    # What objectives ask of a model, beside `encode_image`, `encode_text` and `fuse`. These are the
    # usual answers; a family whose heads read something else gives its own.

    # A part, or None where the config has it not.
    contrastive: Any
    matching: Any
    masked_language: Any
    answering: Any
    ranking: Any

    @property
    def word_embeddings(self) -> Any:
        """The embeddings of words, whose table scores words as well where it is tied."""
        return self.text.embeddings  # type: ignore[attr-defined]

    def embed_image(self, image: Encoded) -> Float[Array, "batch embedding"]:
        """Unit vectors of encoded pictures."""
        return self.contrastive.image(image.pooled)

    def embed_text(self, text: Encoded) -> Float[Array, "batch embedding"]:
        """Unit vectors of encoded texts."""
        return self.contrastive.text(text.pooled)

    @property
    def matcher(self) -> Any:
        """The head that `match` reads, or None."""
        return self.matching

    def match(self, fused: Fused) -> Float[Array, "batch 2"]:
        """Logits of no and yes: does the text belong to the picture?"""
        return self.matcher(fused.pooled)

    def aligned(
        self, image: Encoded, text: Encoded
    ) -> tuple[Bool[Array, "batch patches"], Bool[Array, "batch length"]]:
        """Which tokens of pictures and of texts transport moves onto one another: true on them."""
        return mask_of(image), mask_of(text)

    def rank(self, fused: Fused) -> Float[Array, " batch"]:
        """A number for each pair, by which retrieval ranks it."""
        return self.ranking(fused.pooled)[:, 0]

    def score_words(
        self, tokens: Float[Array, "batch length width"]
    ) -> Float[Array, "batch length words"]:
        """Logits of every word at every position of a fused text."""
        return self.masked_language(tokens, self.word_embeddings)

    def score_answers(self, fused: Fused) -> Float[Array, "batch answers"]:
        """Logits of the closed list of answers."""
        return self.answering(fused.pooled)

    # A model that writes has `decode(context, decoder_text, decoder_mask, key)` as well, the scores
    # of the word behind each token. What its decoder looks at:

    def caption_context(self, image: Encoded) -> Encoded:
        """To describe pictures: their tokens."""
        return image

    def answer_context(self, image: Encoded, fused: Fused, text: Encoded) -> Encoded:
        """To answer questions: their tokens, which have seen the picture."""
        return Encoded(tokens=fused.text_tokens, mask=text.mask, pooled=fused.pooled)


def taken(phase: Callable[..., Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Those fields of a batch that a phase of a model has parameters for."""
    return {name: fields[name] for name in inspect.signature(phase).parameters if name in fields}


@functools.partial(jax.jit, static_argnames="graph")
def _forward(graph: Any, state: Any, inputs: dict[str, Any], key: Any) -> dict[str, Any]:
    """One program for all of it: called op by op, a model would be hundreds of small ones."""
    return nnx.merge(graph, state).forward(**inputs, key=key)


def _require(
    name: str, parameters: Mapping[str, inspect.Parameter], inputs: Mapping[str, Any]
) -> None:
    for needed, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and inputs.get(needed) is None:
            raise InputError(f"{name} needs the input {needed!r}.")


def _check(name: str, array: jax.Array | np.ndarray | None) -> None:
    """Refuse what would be taken for something else."""
    if array is None:
        return
    is_float = jax.numpy.issubdtype(array.dtype, jax.numpy.floating)
    if name in ("image", "image_b") and not is_float and array.dtype != jax.numpy.uint8:
        raise InputError(
            f"{name} is {array.dtype}: give uint8 pixels, or floats that are normalised already."
        )
    if name in ("text", "text_b", "decoder_text") and (is_float or array.ndim < 2):
        raise InputError(
            f"{name} is {array.dtype} {list(array.shape)}: give token ids, whole numbers [B, L]."
        )


class PictureModel(Model):
    """A model with an encoder of pictures, `image`."""

    image: Any

    def encode_image(
        self,
        image: Float[Array, "batch height width 3"]
        | UInt8[Array, "batch height width 3"]
        | None = None,
        key: Key[Array, ""] | None = None,
        image_shift: Float[Array, "batch length channels"] | None = None,
        regions: Float[Array, "batch regions features"] | None = None,
        boxes: Float[Array, "batch regions 4"] | None = None,
        region_mask: Bool[Array, "batch regions"] | None = None,
        region_masked: Bool[Array, "batch regions"] | None = None,
    ) -> Encoded:
        """Features of pictures (uint8, or float already normalised), or of regions in them.

        Their encoder gets what it takes. `image_shift` is added to the vectors of a ViT's patches,
        or to the features of regions.

        Raises InputError where something is missing, or there is nowhere to add a shift.
        """
        inputs = {
            "image": image,
            "regions": regions,
            "boxes": boxes,
            "region_mask": region_mask,
            "region_masked": region_masked,
            "shift": image_shift,
        }
        parameters = inspect.signature(self.image).parameters
        if image_shift is not None and "shift" not in parameters:
            raise InputError(
                f"image_shift is added to the patches of a ViT or to regions, and pictures are "
                f"encoded by a {type(self.image).__name__} here: leave it out, or take a ViT."
            )
        _require(type(self).__name__, parameters, inputs)
        return self.image(**taken(self.image, inputs), key=key)


class PairModel(PictureModel):
    """A model with an encoder of texts, `text`, as well."""

    text: Any

    def encode_text(
        self,
        text: Int[Array, "batch length"],
        text_mask: Bool[Array, "batch length"] | None = None,
        key: Key[Array, ""] | None = None,
        text_shift: Float[Array, "batch length width"] | None = None,
    ) -> Encoded:
        """Features of token ids that have not seen a picture; the mask is true on tokens.

        `text_shift` is added to the words' vectors.
        """
        return self.text(text, text_mask, key=key, shift=text_shift)
