"""Flickr8k as it is published: photographs with five captions each (Hodosh et al. 2013)."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmjax.errors import InputError, near_misses

SPLIT_FILES = {
    "train": "Flickr_8k.trainImages.txt",
    "dev": "Flickr_8k.devImages.txt",
    "validation": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}
CAPTION_FILE = "Flickr8k.token.txt"
IMAGE_FOLDERS = ("images", "Flicker8k_Dataset", "Flickr8k_Dataset")  # the second: sic, published

_CAPTION_KEY = re.compile(r"(?P<name>.+)#(?P<number>\d+)")


class Flickr8k:
    """The pictures of one split, in the order of its list, each with all of its captions.

    `root` holds `Flickr8k.token.txt` (rows of `NAME.jpg#NUMBER<TAB>CAPTION`), the lists
    `Flickr_8k.{train,dev,test}Images.txt` (a name a row) and a folder of pictures. Captions of
    pictures outside the split are not looked at: the published file has one for a picture that
    does not exist.

    A record has `image` (a path; pixels are not read here), `image_id` (the row in the list, from
    0), `name` and `captions`, ordered by their number.

    Raises:
      InputError: a file or folder is missing or empty, a row is malformed, a caption is empty or
        not UTF-8, or a picture of the split has no caption, no file or is listed twice.
    """

    def __init__(self, root: str | Path, split: str):
        if split not in SPLIT_FILES:
            raise InputError(
                f"data.split = {split!r} is no split of Flickr8k.{near_misses(split, SPLIT_FILES)}"
            )
        root = Path(root)
        if not root.is_dir():
            raise InputError(f"data.root = {root}: there is no such folder.")
        names = _read_split(root / SPLIT_FILES[split])
        captions = _read_captions(root / CAPTION_FILE, names)
        folder = _find_image_folder(root)
        _require_pictures(names, folder, listed_in=root / SPLIT_FILES[split])
        self._folder = folder
        self._names = names
        self._captions = [captions[name] for name in names]

    def __len__(self) -> int:
        return len(self._names)

    def texts(self) -> Iterator[str]:
        """Every caption, to learn a vocabulary from."""
        for captions in self._captions:
            yield from captions

    def __getitem__(self, row: int) -> dict[str, Any]:
        row = range(len(self))[row]
        return {
            "image": self._folder / self._names[row],
            "image_id": row,
            "name": self._names[row],
            "captions": list(self._captions[row]),
        }


def _read_split(path: Path) -> list[str]:
    """The names of a split list, in its order."""
    rows: dict[str, int] = {}
    for row, name in _read_rows(path):
        name = name.strip()
        if name in rows:
            raise InputError(
                f"{path}, rows {rows[name]} and {row}: {name} is listed twice. Remove one."
            )
        rows[name] = row
    if not rows:
        raise InputError(f"{path} is empty; a name of a picture a row is expected.")
    return list(rows)


def _read_captions(path: Path, names: list[str]) -> dict[str, list[str]]:
    """The captions of each of `names`, ordered by their number."""
    numbered: dict[str, dict[int, str]] = {name: {} for name in names}
    for row, text in _read_rows(path):
        key, tab, caption = text.partition("\t")
        match = _CAPTION_KEY.fullmatch(key)
        if not tab or match is None:
            raise InputError(
                f"{path}, row {row}: expected NAME.jpg#NUMBER, a tab and a caption, found {text!r}."
            )
        name, number = match["name"], int(match["number"])
        if name not in numbered:
            continue
        if not caption.strip():
            raise InputError(
                f"{path}, row {row}: the caption of {key} is empty. Write one or remove the row."
            )
        if number in numbered[name]:
            raise InputError(f"{path}, row {row}: {key} is there twice. Remove one of the rows.")
        numbered[name][number] = caption.strip()
    bare = [name for name in names if not numbered[name]]
    if bare:
        raise InputError(
            f"{path}: {_count(bare, 'picture')} of the split without a caption: {_first(bare)}. "
            "Add captions or take the names off the split list."
        )
    return {name: [texts[i] for i in sorted(texts)] for name, texts in numbered.items()}


def _read_rows(path: Path) -> Iterator[tuple[int, str]]:
    """The rows of a UTF-8 text with their numbers, from 1; blank ones left out."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist. {_EXPECTED_LAYOUT}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    for row, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            text = line.decode("utf-8").rstrip("\r")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}, row {row}: not UTF-8 (byte {error.start + 1} of the row is "
                f"0x{line[error.start]:02x}). Convert the file to UTF-8."
            ) from error
        if text.strip():
            yield row, text


def _find_image_folder(root: Path) -> Path:
    for name in IMAGE_FOLDERS:
        if (root / name).is_dir():
            return root / name
    raise InputError(
        f"{root} has no folder of pictures; looked for {', '.join(IMAGE_FOLDERS)}. "
        f"{_EXPECTED_LAYOUT}"
    )


def _require_pictures(names: list[str], folder: Path, listed_in: Path) -> None:
    # One listing of the folder instead of a question per picture: it may lie over a network.
    present = {path.name for path in folder.iterdir()}
    if not present:
        raise InputError(f"{folder} is empty; the pictures of Flickr8k are expected in it.")
    absent = [name for name in names if name not in present]
    if absent:
        raise InputError(
            f"{folder}: {_count(absent, 'picture')} of {listed_in.name} not there: "
            f"{_first(absent)}. Add the files or take the names off the list."
        )


def _count(items: list[str], noun: str) -> str:
    return f"1 {noun}" if len(items) == 1 else f"{len(items)} {noun}s"


def _first(names: list[str], shown: int = 5) -> str:
    return ", ".join(names[:shown]) + (", …" if len(names) > shown else "")


_EXPECTED_LAYOUT = (
    f"Flickr8k is expected as published: {CAPTION_FILE}, Flickr_8k.{{train,dev,test}}Images.txt "
    f"and a folder {' or '.join(IMAGE_FOLDERS)}."
)
