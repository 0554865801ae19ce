"""SigLIP's tokens: SentencePiece over a text without case and punctuation (Zhai et al. 2023)."""

import re
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, models

from mmjax.errors import InputError
from mmjax.processing.sentencepiece import (
    NORMAL,
    SPACE,
    UNIGRAM,
    Normalizer,
    SentencePieceModel,
)
from mmjax.processing.tokenizer import Habits, PretrainedTokenizer

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class SiglipTokenizer(PretrainedTokenizer):
    """The pieces of a unigram model, then the token for the end.

    Special tokens are found in the text first; what is between them is made lower case, loses
    ASCII punctuation and doubled spaces, and is cut into pieces by itself.
    """

    def __init__(
        self,
        model: SentencePieceModel,
        habits: Habits,
        special: Mapping[str, str],
        added: Sequence[AddedToken],
        origin: str,
    ):
        """Raises InputError where the model is of another kind; `origin` names its file."""
        if model.model_type != UNIGRAM:
            raise InputError(f"{origin}: SigLIP has a unigram model; this one is of another kind.")
        self._model = model
        self._normalize = Normalizer(model, origin)
        # A text may not be cut into pieces that are no text; with a space they never match.
        self._unigram = models.Unigram(
            [(p.text if p.type == NORMAL else f" {p.text}", p.score) for p in model.pieces],
            unk_id=model.unknown_id,
        )
        self._ids = {piece.text: i for i, piece in enumerate(model.pieces)}
        self._added = {token.content: token for token in added}
        for token in self._added:
            self._ids.setdefault(token, len(self._ids))
        self._texts = {i: text for text, i in self._ids.items()}
        longest_first = sorted(self._added, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        super().__init__(habits, special, len(self._ids))
        if self.eos_id is None:
            raise InputError(f"{origin}: SigLIP needs an eos_token, '</s>', in its vocabulary.")
        self._end = self.eos_id
        self._prefix = special["unk"]
        self._prefix_length = len(self._pieces(self._prefix))

    def encode_text(
        self, text: str, pair: str | None = None, limit: int | None = None
    ) -> tuple[list[int], list[int]]:
        """As `PretrainedTokenizer.encode_text`; there are no pairs."""
        if pair is not None:
            raise InputError("text_pair: SigLIP reads one text, and knows no pairs.")
        if limit is not None and limit < 1:
            raise InputError(f"A text of {limit} tokens has no room for the token of its end.")
        ids = self._tokens(text)
        if limit is not None and len(ids) >= limit:
            cut = len(ids) - limit + 1
            ids = ids[cut:] if self.habits.truncation_side == "left" else ids[: len(ids) - cut]
        if ids[-1:] != [self._end]:
            ids = [*ids, self._end]
        return ids, [0] * len(ids)

    def decode(self, ids: Iterable[int]) -> str:
        """As `PretrainedTokenizer.decode`."""
        unseen = {self._ids[text] for text, token in self._added.items() if token.special}
        texts = (self._texts.get(int(i), "") for i in ids if int(i) not in unseen)
        return "".join(texts).replace(SPACE, " ").strip()

    def id_of(self, token: str) -> int | None:
        """As `PretrainedTokenizer.id_of`."""
        return self._ids.get(token)

    def save(self, folder: Path, processor_class: str | None = None) -> None:
        """Writes `spiece.model` and `tokenizer_config.json`."""
        path = folder / "spiece.model"
        try:
            path.write_bytes(self._model.content)
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}.") from error
        added = {self._ids[content]: token for content, token in self._added.items()}
        self._save_config(folder, processor_class, added)

    def _tokens(self, text: str) -> list[int]:
        """The ids of a text without that of its end."""
        parts = self._split.split(SPACE + text.replace(SPACE, " "))
        for i in range(1, len(parts), 2):
            token = self._added[parts[i]]
            parts[i - 1] = parts[i - 1].rstrip() if token.lstrip else parts[i - 1]
            parts[i + 1] = parts[i + 1].lstrip() if token.rstrip else parts[i + 1]
        ids = []
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(self._ids[part])
            elif part:
                # SentencePiece drops a leading space; behind another text it stays.
                whole = self._pieces(self._prefix + self._canonical(part))
                ids += whole[self._prefix_length :]
        return ids

    def _canonical(self, text: str) -> str:
        if self.habits.options.get("do_lower_case", True):
            text = text.lower()
        return " ".join(text.translate(_NO_PUNCTUATION).split())

    def _pieces(self, text: str) -> list[int]:
        return [token.id for token in self._unigram.tokenize(self._normalize(text))]
