"""What every whole model has in common: named inputs in, named outputs out."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from mmjax.errors import InputError, near_misses
from mmjax.models.features import Encoded


class Model(nnx.Module):
    """Call it with the fields of a batch by name; it answers with a dict of outputs by name.

    Inputs are named as in a batch (`docs/models.md` lists them): `image [B,H,W,3]` (float and
    already normalised, or uint8), `text [B,L]`, `text_mask [B,L]`, `regions [B,R,F]`, …; outputs as
    Hugging Face names them. A family defines `forward`, whose parameters are what it can take.
    """

    config: Any
    forward: Callable[..., dict[str, Any]]  # the outputs of one batch; `key=None`: no dropout
    family = ""  # whose names it was loaded under, if it was; `mmjax.save_huggingface` writes them

    def __call__(
        self, *, train: bool = False, key: Key[jax.Array, ""] | None = None, **inputs: Any
    ) -> dict[str, Any]:
        """All that the model has to say of a batch.

        With `train=True` dropout is drawn from `key`; without, nothing is random.

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
        for needed, parameter in parameters.items():
            if parameter.default is inspect.Parameter.empty and inputs.get(needed) is None:
                raise InputError(f"{name} needs the input {needed!r}.")
        arrays = {k: None if v is None else jax.numpy.asarray(v) for k, v in inputs.items()}
        for name, array in arrays.items():
            _check(name, array)
        return self.forward(**arrays, key=key)


def _check(name: str, array: jax.Array | None) -> None:
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
        image: Float[Array, "batch height width 3"] | UInt8[Array, "batch height width 3"],
        key: Key[Array, ""] | None = None,
    ) -> Encoded:
        """Features of pictures (uint8, or float already normalised)."""
        return self.image(image, key=key)


class PairModel(PictureModel):
    """A model with an encoder of texts, `text`, as well."""

    text: Any

    def encode_text(
        self,
        text: Int[Array, "batch length"],
        text_mask: Bool[Array, "batch length"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Encoded:
        """Features of token ids that have not seen a picture; the mask is true on tokens."""
        return self.text(text, text_mask, key=key)
