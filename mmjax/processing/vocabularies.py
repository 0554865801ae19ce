"""Reading the vocabulary of a folder, from whichever of its files holds it."""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from mmjax.data.tokenizer import read_vocabulary
from mmjax.errors import InputError
from mmjax.json_files import find_json
from mmjax.processing.classes import Vocabulary
from mmjax.processing.sentencepiece import (
    CONTROL,
    UNIGRAM,
    USER_DEFINED,
    SentencePieceModel,
)


@dataclass(frozen=True)
class TokenizerFiles:
    """The files of a folder that speak of its tokenizer."""

    folder: Path
    config: Mapping[str, Any]  # tokenizer_config.json
    tokenizer: Mapping[str, Any] | None  # tokenizer.json

    @classmethod
    def find(cls, folder: Path) -> "TokenizerFiles | None":
        """The files in a folder; None where no vocabulary is. Raises InputError."""
        files = cls(
            folder,
            config=find_json(folder / "tokenizer_config.json") or {},
            tokenizer=find_json(folder / "tokenizer.json"),
        )
        lists = any((folder / name).is_file() for name in ("vocab.txt", "vocab.json"))
        return files if files.tokenizer or lists or files.sentencepiece() else None

    def sentencepiece(self) -> Path | None:
        """The SentencePiece model. Raises InputError where there are several."""
        usual = self.folder / "spiece.model"
        found = [usual] if usual.is_file() else sorted(self.folder.glob("*.model"))
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise InputError(f"{self.folder} has several SentencePiece models: {names}. Keep one.")
        return found[0] if found else None

    def vocabulary(self, model: str) -> Vocabulary:
        """The vocabulary of a 'WordPiece', 'BPE' or 'Unigram' model.

        Raises:
          InputError: the folder has none, or it is broken.
        """
        if self.tokenizer:
            return _from_tokenizer_json(self.tokenizer, model, self.folder / "tokenizer.json")
        if model == "WordPiece":
            tokens = read_vocabulary(self.folder / "vocab.txt")
            return Vocabulary(ids={token: i for i, token in enumerate(tokens)})
        if model == "BPE":
            return _from_lists(self.folder / "vocab.json", self.folder / "merges.txt")
        path = self.sentencepiece()
        if path is None:
            raise InputError(f"{self.folder} has neither tokenizer.json nor spiece.model.")
        return _from_sentencepiece(path)


def _from_tokenizer_json(content: Mapping[str, Any], model: str, path: Path) -> Vocabulary:
    """The vocabulary in a file of the `tokenizers` library."""
    part = content.get("model")
    if not isinstance(part, dict) or part.get("type", model) != model:
        found = part.get("type") if isinstance(part, dict) else part
        raise InputError(f"{path}: expected a {model} model, found {found!r}.")
    try:
        if model == "Unigram":
            scores = [(str(token), float(score)) for token, score in part["vocab"]]
            return Vocabulary(scores=scores, charsmap=_charsmap(content.get("normalizer")))
        ids = {str(token): int(i) for token, i in part["vocab"].items()}
        merges = [_merge(merge) for merge in part.get("merges", ())]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: its vocabulary is broken ({error!r}). Copy it anew.") from error
    return Vocabulary(ids=ids, merges=merges, template=_template(content, path))


def _merge(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _charsmap(normalizer: Any) -> bytes:
    """SentencePiece's table, which one of the normalisers of a `tokenizer.json` may hold."""
    for part in (normalizer or {}).get("normalizers", [normalizer or {}]):
        if "precompiled_charsmap" in part:
            return base64.b64decode(part["precompiled_charsmap"])
    return b""


def _template(content: Mapping[str, Any], path: Path) -> Any:
    """The post-processor of a `tokenizer.json`."""
    if content.get("post_processor") is None:
        return None
    empty = {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}
    try:
        rest = empty | {"post_processor": content["post_processor"]}
        return Tokenizer.from_str(json.dumps(rest)).post_processor
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{path}: its post_processor is broken ({error}).") from error


def _from_lists(vocabulary: Path, merges: Path) -> Vocabulary:
    """The byte-pair encoding of `vocab.json` and `merges.txt`."""
    ids = find_json(vocabulary)
    if ids is None or not merges.is_file():
        raise InputError(
            f"{vocabulary.parent} has neither tokenizer.json nor both {vocabulary.name} and "
            f"{merges.name}, which byte-pair encoding needs."
        )
    for token, i in ids.items():
        if not isinstance(i, int) or i < 0:
            raise InputError(f"{vocabulary}: the token {token!r} has the id {i!r}, no number.")
    try:
        lines = merges.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{merges} cannot be read: {error}.") from error
    pairs = []
    for number, line in enumerate(lines, start=1):
        if not line or line.startswith("#version"):
            continue
        pair = tuple(line.rstrip("\r").split(" "))
        if len(pair) != 2:
            raise InputError(f"{merges}, line {number}: a merge is two tokens, not {line!r}.")
        pairs.append(pair)
    return Vocabulary(ids=ids, merges=pairs)


def _from_sentencepiece(path: Path) -> Vocabulary:
    model = SentencePieceModel.read(path)
    if model.model_type != UNIGRAM:
        raise InputError(
            f"{path} is a SentencePiece model, but no unigram one. Its folder needs a "
            "tokenizer.json: transformers' AutoTokenizer.from_pretrained(…).save_pretrained(…) "
            "writes it."
        )
    return Vocabulary(
        scores=[(piece.text, piece.score) for piece in model.pieces],
        charsmap=model.charsmap,
        extra=[
            AddedToken(piece.text, normalized=False, special=piece.type == CONTROL)
            for piece in model.pieces
            if piece.type in (CONTROL, USER_DEFINED)
        ],
    )
