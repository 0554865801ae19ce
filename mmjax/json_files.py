"""The JSON files beside weights, processors and models. What they say is data, never executed."""

import json
import os
from pathlib import Path
from typing import Any

from mmjax.errors import InputError

MAX_JSON_BYTES = 100_000_000  # the limit that safetensors sets to its own header

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      InputError: the file cannot be read, is not JSON, holds something else than an object, or
        gives one key two values.
    """
    path = Path(path)
    if (size := checked_size(path)) > MAX_JSON_BYTES:
        raise InputError(f"{path}: {size:,} bytes are too many for a JSON file.")
    return parse_json(path.read_bytes(), str(path))


def find_json(path: Path) -> dict[str, Any] | None:
    """As `read_json`; None where there is no such file."""
    return read_json(path) if os.path.lexists(path) else None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes an object as people can read it.

    Raises:
      InputError: the file cannot be written.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}.") from error


def parse_json(text: bytes, origin: str) -> dict[str, Any]:
    """The object that `text` spells; `origin` names it in the messages of an `InputError`."""

    def unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if found.setdefault(key, value) != value:
                raise InputError(f"{origin}: the key {key!r} is there twice, with two values.")
        return found

    try:
        parsed = json.loads(text, object_pairs_hook=unambiguous)
    except InputError:
        raise
    except json.JSONDecodeError as error:
        raise InputError(
            f"{origin}: not JSON, from line {error.lineno}, column {error.colno} on: {error.msg}."
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{origin}: not JSON: {error}.") from error
    if not isinstance(parsed, dict):
        raise InputError(f"{origin}: expected a JSON object, found a {type(parsed).__name__}.")
    return parsed


def checked_size(path: Path) -> int:
    """The size in bytes of a file that is there, is not empty and is no pointer of Git LFS."""
    if os.path.islink(path) and not os.path.exists(path):
        raise InputError(f"{path}: this is a link to a file that is gone; download it again.")
    if not os.path.isfile(path):  # Path.is_file raises for some names that no file can have
        raise InputError(f"{path}: there is no such file.")
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise InputError(f"{path}: the file cannot be read: {error.strerror}.") from error
    if not size:
        raise InputError(f"{path}: the file is empty; download it again.")
    if start == _LFS_POINTER:
        raise InputError(
            f"{path}: this is a Git LFS pointer, not the file itself. In its folder run "
            "'git lfs install' and 'git lfs pull'."
        )
    return size
