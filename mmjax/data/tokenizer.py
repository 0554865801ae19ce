"""Text to token ids and back: BERT's WordPiece, over the `tokenizers` library."""

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int32
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from mmjax.errors import InputError

# One caption is too little work to share out among threads, and the data pipeline runs many
# captions at once already. Left unset, the library also warns whenever a process forks.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

PAD, UNK, CLS, SEP, MASK = SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class TextTokenizer:
    """Lower-cased WordPiece tokens between `[CLS]` and `[SEP]` (Devlin et al. 2019, section 3).

    The text is data throughout: a caption that spells out `[MASK]` gets the pieces of that
    spelling, never the special token. Instances may be shared between threads and pickled.

    Attributes:
      vocabulary_size: how many ids there are, the rows of an embedding table.
      pad_id, cls_id, sep_id, mask_id: the ids of `[PAD]`, `[CLS]`, `[SEP]`, `[MASK]`.
      special_ids: these and that of `[UNK]`: tokens that are neither masked nor guessed.
      end_token: whether a text ends in `[SEP]`. ALBEF's do not.
    """

    def __init__(self, tokenizer: Tokenizer, origin: str):
        """Wraps a tokenizer of the library; `origin` names it in messages.

        Raises:
          InputError: the vocabulary lacks a special token.
        """
        ids = tokenizer.get_vocab()
        missing = [token for token in SPECIAL_TOKENS if token not in ids]
        if missing:
            raise InputError(
                f"{origin}: the vocabulary has no {', '.join(missing)}. A BERT vocabulary holds "
                f"{' '.join(SPECIAL_TOKENS)}; add what is missing."
            )
        # Lengths are given call by call: the library's own settings would be shared state.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.vocabulary_size: int = tokenizer.get_vocab_size()
        self.pad_id = ids[PAD]
        self.cls_id = ids[CLS]
        self.sep_id = ids[SEP]
        self.mask_id = ids[MASK]
        self.special_ids = tuple(ids[token] for token in SPECIAL_TOKENS)
        self.end_token: bool = tokenizer.encode("").ids[-1:] == [self.sep_id]

    @classmethod
    def from_vocabulary(cls, path: str | Path) -> "TextTokenizer":
        """A tokenizer from a published `vocab.txt`: one token a line, the id is the line number.

        Raises:
          InputError: as `read_vocabulary`, or a special token is not there.
        """
        return cls(_wordpiece(read_vocabulary(path)), origin=str(path))

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary_size: int) -> "TextTokenizer":
        """A tokenizer with at most `vocabulary_size` tokens learnt from `texts`.

        The same texts give the same vocabulary, ids included. Pieces seen only once are not
        learnt, so that few texts give fewer tokens than allowed.

        Raises:
          InputError: the size does not even hold the characters of the texts.
        """
        texts = list(texts)
        untrained = _wordpiece(SPECIAL_TOKENS)
        words = {
            word
            for text in texts
            for word, _ in untrained.pre_tokenizer.pre_tokenize_str(
                untrained.normalizer.normalize_str(text)
            )
        }
        characters = sorted(set().union(*words))
        # The trainer numbers the single characters, and thereby breaks ties between merges, in
        # the order of a randomly seeded hash table, unless it is given them all from the start.
        start = [*SPECIAL_TOKENS, *characters, *(f"##{character}" for character in characters)]
        if len(start) > vocabulary_size:
            raise InputError(
                f"A vocabulary of {vocabulary_size} tokens is too small: the texts have "
                f"{len(characters)} different characters, which take {len(start)} tokens."
            )
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocabulary_size,
            min_frequency=2,
            special_tokens=start,
            limit_alphabet=len(characters),
            show_progress=False,
        )
        untrained.train_from_iterator(texts, trainer)
        ids = untrained.get_vocab()
        return cls(_wordpiece(sorted(ids, key=ids.__getitem__)), origin="the trained tokenizer")

    @classmethod
    def from_json(cls, text: str) -> "TextTokenizer":
        """The tokenizer that `to_json` wrote.

        Raises:
          InputError: the text is no such JSON.
        """
        try:
            tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise InputError(f"The tokenizer's JSON cannot be read: {error}.") from error
        return cls(tokenizer, origin="the tokenizer's JSON")

    def to_json(self) -> str:
        """The whole tokenizer, in the format of the `tokenizers` library (`tokenizer.json`)."""
        return self._tokenizer.to_str()

    def with_end_token(self, end_token: bool) -> "TextTokenizer":
        """A tokenizer of the same vocabulary whose texts end in `[SEP]`, or do not."""
        tokenizer = Tokenizer.from_str(self.to_json())
        tokenizer.post_processor = _special_tokens(tokenizer.get_vocab(), end_token)
        return TextTokenizer(tokenizer, origin="the tokenizer")

    @functools.cached_property
    def continues(self) -> Bool[np.ndarray, " words"]:
        """For every id whether it goes on with the word before it, as `##` pieces do."""
        tokens = (self._tokenizer.id_to_token(i) for i in range(self.vocabulary_size))
        return np.array([(token or "").startswith("##") for token in tokens])

    def count(self, text: str) -> int:
        """How many tokens a text takes, `[CLS]` and `[SEP]` not counted."""
        return len(self._pieces(text))

    def encode(
        self, text: str, length: int, *, end_token: bool | None = None
    ) -> tuple[Int32[np.ndarray, " length"], Bool[np.ndarray, " length"]]:
        """Token ids and their mask (True on a token, False on padding).

        A longer text is cut, and ends in `[SEP]` all the same; `end_token` says whether it does,
        where that is not as the tokenizer has it. `length` is at least 2.
        """
        if length < 2:
            raise ValueError(f"[CLS] and [SEP] alone take 2 tokens, more than length = {length}.")
        end = [self.sep_id] if (self.end_token if end_token is None else end_token) else []
        pieces = self._pieces(text)[: length - 1 - len(end)]
        return self._padded([self.cls_id, *pieces, *end], length)

    def encode_pair(
        self, first: str, second: str, length: int
    ) -> tuple[
        Int32[np.ndarray, " length"], Bool[np.ndarray, " length"], Int32[np.ndarray, " length"]
    ]:
        """`[CLS] first [SEP] second [SEP]`: token ids, their mask, and their types.

        The type is 0 up to the first `[SEP]` and in padding, and 1 in between (Devlin et al. 2019,
        section 3). Texts that do not fit are cut at their ends, always the longer one by a token.
        `length` is at least 3.
        """
        if length < 3:
            raise ValueError(f"[CLS], [SEP], [SEP] take 3 tokens, more than length = {length}.")
        end = [self.sep_id] if self.end_token else []
        a, b = self._pieces(first), self._pieces(second)
        while len(a) + len(b) > length - 2 - len(end):
            (a if len(a) > len(b) else b).pop()
        ids, mask = self._padded([self.cls_id, *a, self.sep_id, *b, *end], length)
        return ids, mask, (mask & (np.arange(length) >= len(a) + 2)).astype(np.int32)

    def _pieces(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _padded(
        self, tokens: Sequence[int], length: int
    ) -> tuple[Int32[np.ndarray, " length"], Bool[np.ndarray, " length"]]:
        ids = np.full(length, self.pad_id, np.int32)
        ids[: len(tokens)] = tokens
        return ids, np.arange(length) < len(tokens)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids, word pieces joined; `[CLS]`, `[SEP]` and `[PAD]` left out."""
        unseen = {self.pad_id, self.cls_id, self.sep_id}
        return self._tokenizer.decode(
            [int(i) for i in ids if int(i) not in unseen], skip_special_tokens=False
        )

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """The token of each id, special ones and `##` pieces as the vocabulary spells them."""
        tokens = []
        for i in ids:
            token = self._tokenizer.id_to_token(int(i))
            if token is None:
                raise ValueError(f"id {i} is outside the vocabulary of {self.vocabulary_size}.")
            tokens.append(token)
        return tokens


def read_vocabulary(path: str | Path) -> list[str]:
    """The tokens of a `vocab.txt` in the order of their ids: one a line, each once.

    Raises:
      InputError: the file is absent or not UTF-8, or a token is there twice.
    """
    try:
        tokens = Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n")
    except OSError as error:
        raise InputError(f"{path}: the vocabulary cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: the vocabulary is not UTF-8 ({error}).") from error
    tokens = [token.rstrip("\r") for token in tokens]
    ids: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if token in ids:
            raise InputError(
                f"{path}, lines {ids[token] + 1} and {i + 1}: the token {token!r} is there "
                "twice. A vocabulary has one token a line, each once."
            )
        ids[token] = i
    return tokens


def _wordpiece(tokens: Sequence[str]) -> Tokenizer:
    """The library's tokenizer with BERT's uncased settings; the id of a token is its position."""
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token=UNK))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    if CLS in ids and SEP in ids:
        tokenizer.post_processor = _special_tokens(ids, end_token=True)
    return tokenizer


def _special_tokens(ids: Mapping[str, int], end_token: bool) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{CLS} $A {SEP}" if end_token else f"{CLS} $A",
        special_tokens=[(CLS, ids[CLS]), (SEP, ids[SEP])],
    )
