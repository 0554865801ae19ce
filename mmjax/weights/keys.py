"""Keys of a Hugging Face config.json and the fields of our config dataclasses, both ways.

Files leave out what equals the default of the class that wrote them, so every key carries that
default: what is read is what `transformers` would have built.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mmjax.errors import InputError, near_misses

# Where two of their names are one of ours, the first is written.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


@dataclass(frozen=True)
class Key:
    """A key of config.json (`theirs`) and the field of our config (`ours`) that says the same.

    `default` is what `transformers` takes where the key is absent; `values` maps their values to
    ours where they are spelt differently, and `null` is our value for their null.
    """

    theirs: str
    ours: str
    default: Any
    values: Mapping[Any, Any] = field(default_factory=dict)
    null: Any = None


@dataclass(frozen=True)
class Fixed:
    """A key of which we support one value, which is also what `transformers` takes without it."""

    theirs: str
    value: Any


Keys = Iterable[Key | Fixed]


def read_keys(keys: Keys, config: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Our fields out of a config.json, which `origin` names in messages.

    Raises InputError for values that we cannot build.
    """
    fields = {}
    for key in keys:
        if isinstance(key, Fixed):
            if (value := config.get(key.theirs, key.value)) != key.value:
                raise InputError(
                    f"{origin}: {key.theirs} is {value!r}; only {key.value!r} is supported."
                )
            continue
        value = config.get(key.theirs, key.default)
        value = tuple(value) if isinstance(value, list) else value
        if value is None and key.null is not None:
            value = key.null
        elif key.values:
            if value not in key.values:
                raise InputError(
                    f"{origin}: {key.theirs} is {value!r}." + near_misses(str(value), key.values)
                )
            value = key.values[value]
        elif key.default is not None and not _fits(value, key.default):
            like = list(key.default) if isinstance(key.default, tuple) else key.default
            raise InputError(
                f"{origin}: {key.theirs} is {config[key.theirs]!r}, where a {type(like).__name__} "
                f"as {like!r} is expected."
            )
        fields[key.ours] = value
    return fields


def write_keys(keys: Keys, config: Any) -> dict[str, Any]:
    """What config.json says of our config dataclass."""
    written = {}
    for key in keys:
        if isinstance(key, Fixed):
            written[key.theirs] = key.value
            continue
        value = getattr(config, key.ours)
        if key.null is not None and value == key.null:
            value = None
        elif key.values:
            value = next(theirs for theirs, ours in key.values.items() if ours == value)
        written[key.theirs] = list(value) if isinstance(value, tuple) else value
    return written


def _fits(value: Any, default: Any) -> bool:
    """Sizes may come as pairs, lists are of whole numbers, and a flag is no number."""
    if isinstance(default, tuple):
        return isinstance(value, tuple) and all(type(item) is int for item in value)
    if isinstance(value, tuple):
        return len(value) == 2 and all(_fits(item, default) for item in value)
    return type(value) is type(default) or (isinstance(default, float) and type(value) is int)
