"""One comparison with a class of `transformers`: its tiny model, inputs, and what to call them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Inputs = dict[str, np.ndarray]

NAMES = {
    "image": "pixel_values",
    "text": "input_ids",
    "text_mask": "attention_mask",
    "text_type": "token_type_ids",
}


def renamed(inputs: Inputs, names: Mapping[str, str] = NAMES) -> Inputs:
    """Our inputs under Hugging Face's names: pictures channels first, masks as numbers."""
    theirs = {}
    for name, array in inputs.items():
        if name.startswith("image") and array.ndim == 4:
            array = array.transpose(0, 3, 1, 2)
        theirs[names[name]] = array.astype(np.int64) if array.dtype == bool else array
    return theirs


@dataclass(frozen=True)
class Case:
    """A class of `transformers` at one tiny configuration.

    Attributes:
      name: 'vit', or with what is uncommon about it, 'vit-rectangular'.
      kind: the name of the class there.
      config: makes the config there; gets the module `transformers`.
      inputs: makes our inputs out of a generator of random numbers.
      theirs: our inputs -> the arguments there.
      call: runs the model there, (model, arguments) -> mapping; for classes that keep to themselves
        what is compared.
      outputs: the outputs there, as a (nested) mapping of arrays -> ours, where shapes differ.
      recorded: whether it is among the goldens of `tests/goldens`.
    """

    name: str
    kind: str
    config: Callable[[Any], Any]
    inputs: Callable[[np.random.Generator], Inputs]
    theirs: Callable[[Inputs], Inputs] = renamed
    call: Callable[..., Mapping[str, Any]] = lambda model, **arguments: model(**arguments)
    outputs: Callable[[dict[str, Any]], dict[str, Any]] = lambda outputs: outputs
    recorded: bool = False


def pictures(
    rng: np.random.Generator, batch: int = 2, height: int = 16, width: int = 16
) -> np.ndarray:
    return rng.normal(size=(batch, height, width, 3)).astype(np.float32)


def texts(
    rng: np.random.Generator, batch: int = 2, length: int = 7, words: int = 20, pad: int = 0
) -> Inputs:
    """Token ids above 3, the last row padded, and their mask."""
    text = rng.integers(4, words, size=(batch, length))
    mask = np.ones((batch, length), bool)
    mask[-1, length - length // 3 :] = False
    return {"text": np.where(mask, text, pad), "text_mask": mask}


LAYERS = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
}
UNCOMMON_LAYERS = {
    "hidden_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "intermediate_size": 20,
}
