"""SentencePiece models (Kudo and Richardson 2018): the file, and its own way to normalise a text.

The file is one protobuf message, of which a few fields are needed; so it is read here, and neither
the `sentencepiece` package nor protobuf is.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmjax.errors import InputError

SPACE = "▁"  # what SentencePiece writes for a space

UNIGRAM = 1  # trainer_spec.model_type; 2 is BPE
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # pieces.type; 5 is unused, 6 are bytes


class Piece(NamedTuple):
    """One entry of the vocabulary; its id is its position."""

    text: str
    score: float  # log probability
    type: int


@dataclass(frozen=True)
class SentencePieceModel:
    """What a `*.model` file holds, as far as encoding a text needs it."""

    pieces: list[Piece]
    model_type: int
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    content: bytes  # the file itself, to write it again

    @classmethod
    def read(cls, path: Path) -> "SentencePieceModel":
        """Reads a model.

        Raises:
          InputError: the file cannot be read or is no SentencePiece model.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}.") from error
        try:
            message = _fields(content)
            pieces = [_piece(piece) for piece in message.get(1, [])]
            trainer, normalizer = (_fields(message.get(n, [b""])[-1]) for n in (2, 3))
        except (IndexError, ValueError, TypeError, struct.error) as error:
            raise InputError(
                f"{path} is no SentencePiece model, or is cut short ({error}). "
                "Copy it anew from where it came from."
            ) from error
        if not any(piece.type == UNKNOWN for piece in pieces):
            raise InputError(f"{path} is no SentencePiece model: it has no unknown piece.")
        return cls(
            pieces=pieces,
            model_type=trainer.get(3, [UNIGRAM])[-1],
            charsmap=normalizer.get(2, [b""])[-1],
            add_dummy_prefix=bool(normalizer.get(3, [1])[-1]),
            remove_extra_whitespaces=bool(normalizer.get(4, [1])[-1]),
            content=content,
        )

    @property
    def unknown_id(self) -> int:
        """The id of what the vocabulary lacks."""
        return next(i for i, piece in enumerate(self.pieces) if piece.type == UNKNOWN)


def _fields(message: bytes) -> dict[int, list]:
    """The values of a protobuf message by field number: ints, or bytes left as they are."""
    fields: dict[int, list] = {}
    position = 0

    def number() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
            if shift > 63:
                raise ValueError("a number has no end")

    def taken(length: int) -> bytes:
        nonlocal position
        position += length
        if position > len(message):
            raise ValueError("a field has no end")
        return message[position - length : position]

    while position < len(message):
        key = number()
        match key & 7:
            case 0:
                value: int | bytes = number()
            case 1:
                value = taken(8)
            case 2:
                value = taken(number())
            case 5:
                value = taken(4)
            case kind:
                raise ValueError(f"no field is of kind {kind}")
        fields.setdefault(key >> 3, []).append(value)
    return fields


def _piece(message: bytes) -> Piece:
    fields = _fields(message)
    (score,) = struct.unpack("<f", fields.get(2, [bytes(4)])[-1])
    return Piece(fields[1][-1].decode("utf-8"), score, fields.get(3, [NORMAL])[-1])


class Normalizer:
    """Replaces characters by the model's table, and writes spaces as `▁`.

    The table is a trie over UTF-8 (a double array, Aoe 1989) and a heap of replacements; of the
    entries that fit at a place the longest is taken. The `Precompiled` normaliser of the
    `tokenizers` library works on grapheme clusters instead, and gives other text for some of them.
    """

    def __init__(self, model: SentencePieceModel, origin: str):
        """Raises InputError where the table is broken; `origin` names the file."""
        self._dummy_prefix = model.add_dummy_prefix
        self._remove_extra = model.remove_extra_whitespaces
        self._trie: list[int] = []
        self._replacements = b""
        if not model.charsmap:
            return
        size = int.from_bytes(model.charsmap[:4], "little")
        trie, self._replacements = model.charsmap[4 : 4 + size], model.charsmap[4 + size :]
        if len(trie) != size or size == 0 or size % 4:
            raise InputError(f"{origin}: the table of replaced characters is broken.")
        self._trie = np.frombuffer(trie, "<u4").tolist()

    def __call__(self, text: str) -> str:
        """The text as the pieces spell it."""
        output: list[str] = []
        after_space = self._remove_extra
        for part in self._parts(text.encode("utf-8")):
            if after_space:
                part = part.lstrip(" ")
            if part:
                output.append(part)
                after_space = self._remove_extra and part.endswith(" ")
        normalised = "".join(output).replace(" ", SPACE)
        if self._remove_extra:
            normalised = normalised.rstrip(SPACE)
        if normalised and self._dummy_prefix:
            normalised = SPACE + normalised
        return normalised

    def _parts(self, text: bytes) -> Iterator[str]:
        """The replacements of `text`, in order; what has none, character by character."""
        start = 0
        while start < len(text):
            end, replacement = self._longest_match(text, start)
            if replacement is None:
                end = start + 1
                while end < len(text) and text[end] & 0xC0 == 0x80:
                    end += 1
                replacement = text[start:end]
            yield replacement.decode("utf-8", errors="replace")
            start = end

    def _longest_match(self, text: bytes, start: int) -> tuple[int, bytes | None]:
        end, replacement = start, None
        if not self._trie:
            return end, replacement
        node = _offset(self._trie[0])
        for position in range(start, len(text)):
            node ^= text[position]
            if node >= len(self._trie):
                break
            unit = self._trie[node]
            if unit & 0x800000FF != text[position]:
                break
            node ^= _offset(unit)
            if unit >> 8 & 1 and node < len(self._trie):  # an entry ends here
                value = self._trie[node] & 0x7FFFFFFF
                end = position + 1
                replacement = self._replacements[value : self._replacements.find(b"\0", value)]
        return end, replacement


def _offset(unit: int) -> int:
    return unit >> 10 << ((unit & 1 << 9) >> 6)
