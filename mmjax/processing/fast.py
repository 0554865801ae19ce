"""Tokenizers of the `tokenizers` library: nearly all there are."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Encoding, Tokenizer, models

from mmjax.errors import InputError
from mmjax.processing.tokenizer import Habits, PretrainedTokenizer


class FastTokenizer(PretrainedTokenizer):
    """A tokenizer of the `tokenizers` library."""

    def __init__(self, tokenizer: Tokenizer, habits: Habits, special: Mapping[str, str]):
        # Lengths are given call by call: the library's own settings would be shared state.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        super().__init__(habits, special, tokenizer.get_vocab_size(with_added_tokens=True))

    def encode_text(
        self, text: str, pair: str | None = None, limit: int | None = None
    ) -> tuple[list[int], list[int]]:
        """As `PretrainedTokenizer.encode_text`; the longer text of a pair is cut first."""
        with as_input_error(f"{self.habits.tokenizer_class} cannot encode a text"):
            encode = self._tokenizer.encode
            first = encode(text, add_special_tokens=False)
            second = None if pair is None else encode(pair, add_special_tokens=False)
            if limit is not None:
                self._cut(first, second, limit)
            encoding = self._tokenizer.post_process(first, second)
        return encoding.ids, encoding.type_ids

    def decode(self, ids: Iterable[int]) -> str:
        """As `PretrainedTokenizer.decode`."""
        with as_input_error(f"{self.habits.tokenizer_class} cannot decode ids"):
            text = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        if not isinstance(self._tokenizer.model, models.BPE):
            return _drawn_up(text) if self.habits.clean_up else text
        # Byte-pair tokens carry their spaces, or a mark where a word ends (CLIP).
        end = self._tokenizer.model.end_of_word_suffix
        return text.replace(end, " ").strip() if end else text

    def id_of(self, token: str) -> int | None:
        """As `PretrainedTokenizer.id_of`."""
        return self._tokenizer.token_to_id(token)

    def save(self, folder: Path, processor_class: str | None = None) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`."""
        path = folder / "tokenizer.json"
        try:
            path.write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}.") from error
        added = self._tokenizer.get_added_tokens_decoder()
        self._save_config(folder, processor_class, added)

    def _cut(self, first: Encoding, second: Encoding | None, limit: int) -> None:
        """Cuts the texts so that with the special tokens they take no more than `limit`."""
        room = limit - self._tokenizer.num_special_tokens_to_add(second is not None)
        if room < 0:
            raise InputError(
                f"A text of {limit} tokens has no room for the special tokens of "
                f"{self.habits.tokenizer_class}, which are {limit - room}."
            )
        lengths = _shares(len(first), 0 if second is None else len(second), room)
        for encoding, length in zip((first, second), lengths, strict=True):
            if encoding is not None:
                encoding.truncate(length, direction=self.habits.truncation_side)


@contextmanager
def as_input_error(what: str) -> Iterator[None]:
    """Tells of an error of the `tokenizers` library as InputError; `what` could not be done.

    The library raises plain Exception, and panics with something that is not even one.
    """
    try:
        yield
    except (InputError, MemoryError):
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise InputError(f"{what}: {error}.") from error
        raise


def _drawn_up(text: str) -> str:
    """The text without the spaces that tokens leave before punctuation and clitics."""
    for spaced in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(spaced, spaced.strip())
    return text


def _shares(first: int, second: int, room: int) -> tuple[int, int]:
    """How much of two texts to keep in `room` tokens: the longer is cut down to the shorter."""
    if first > second:
        second, first = _shares(second, first, room)
        return first, second
    if first + second <= room:
        return first, second
    if 2 * first <= room:
        return first, room - first
    return room // 2, room - room // 2
