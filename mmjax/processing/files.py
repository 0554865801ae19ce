"""Reading the small files of a Hugging Face folder. What they say is data: nothing is executed."""

import json
from pathlib import Path
from typing import Any

from mmjax.errors import InputError


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no such file.

    Raises:
      InputError: the file cannot be read, or is no JSON object.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:  # broken JSON, broken UTF-8, endless nesting
        raise InputError(f"{path} is no valid JSON ({error}). Copy it anew.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} should hold a JSON object and holds a {type(content).__name__}.")
    return content


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
