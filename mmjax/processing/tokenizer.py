"""Text to token ids and back, for models trained elsewhere."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import AddedToken

from mmjax.errors import InputError
from mmjax.json_files import write_json

Side = Literal["left", "right"]


@dataclass(frozen=True)
class Habits:
    """What a tokenizer does unless told otherwise, as its `tokenizer_config.json` has it."""

    tokenizer_class: str
    max_length: int | None = None  # longer texts are cut; None: never
    fixed_length: int | None = None  # texts are padded and cut to it; None: padded to the longest
    padding_side: Side = "right"
    truncation_side: Side = "right"
    inputs: Sequence[str] = ("input_ids", "attention_mask")  # what the model takes
    clean_up: bool = False  # no space before punctuation in decoded text
    options: Mapping[str, Any] = field(default_factory=dict)  # keys of the class, as on disk


class PretrainedTokenizer(ABC):
    """A tokenizer as its model was trained with it.

    A text that spells out a special token gets that token, as in `transformers`; in
    `mmjax.data.tokenizer.TextTokenizer` text is only text. Instances may be shared by threads.

    Attributes:
      vocabulary_size: how many ids there are, added tokens included.
      pad_id, bos_id, eos_id, unk_id, cls_id, sep_id, mask_id: the ids of these special tokens, None
        where there is none. Without a token for padding, as in GPT-2, `pad_id` is `eos_id`.
      special: these tokens as the vocabulary spells them, by role ('pad', 'bos', …).
      habits: what is done unless asked for otherwise.
    """

    def __init__(self, habits: Habits, special: Mapping[str, str], vocabulary_size: int):
        self.habits = habits
        self.special = dict(special)
        self.vocabulary_size = vocabulary_size
        self.bos_id = self._role("bos")
        self.eos_id = self._role("eos")
        self.unk_id = self._role("unk")
        self.cls_id = self._role("cls")
        self.sep_id = self._role("sep")
        self.mask_id = self._role("mask")
        self.pad_id = self._role("pad") if "pad" in self.special else self.eos_id

    def __call__(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        length: int | None = None,
    ) -> dict[str, np.ndarray]:
        """A batch of texts, or of pairs of texts, a pair being one sequence.

        Args:
          texts: the texts.
          pairs: the second text of each.
          length: pad and cut to so many tokens; without it, as the tokenizer is used to.

        Returns:
          `text` int32 [B, L]; `text_mask` bool [B, L], True on a token, unless the model attends
          to padding too; `text_type` int32 [B, L], 1 on second texts, if the model has token types.

        Raises:
          InputError: something is not a text, or `length` has no room for the special tokens.
        """
        if not texts:
            raise InputError("text: the list of texts is empty.")
        if pairs is not None and len(pairs) != len(texts):
            raise InputError(f"{len(texts)} texts and {len(pairs)} second texts make no pairs.")
        length = self.habits.fixed_length if length is None else length
        limit = self.habits.max_length if length is None else length
        encoded = [
            self.encode_text(
                _checked(text, f"text[{i}]"),
                None if pairs is None else _checked(pairs[i], f"text_pair[{i}]"),
                limit,
            )
            for i, text in enumerate(texts)
        ]
        width = max(len(ids) for ids, _ in encoded) if length is None else length
        if self.pad_id is None and any(len(ids) < width for ids, _ in encoded):
            raise InputError(
                f"{self.habits.tokenizer_class} has no token to pad with: give texts of one "
                "length, or name a pad_token in tokenizer_config.json."
            )
        text = np.full((len(texts), width), self.pad_id or 0, np.int32)
        types = np.zeros(text.shape, np.int32)
        mask = np.zeros(text.shape, bool)
        for i, (ids, kinds) in enumerate(encoded):
            start = width - len(ids) if self.habits.padding_side == "left" else 0
            place = i, slice(start, start + len(ids))
            text[place], types[place], mask[place] = ids, kinds, True
        batch = {"text": text}
        if "attention_mask" in self.habits.inputs:
            batch["text_mask"] = mask
        if "token_type_ids" in self.habits.inputs:
            batch["text_type"] = types
        return batch

    @abstractmethod
    def encode_text(
        self, text: str, pair: str | None = None, limit: int | None = None
    ) -> tuple[list[int], list[int]]:
        """Ids and token types of one text or pair with its special tokens, at most `limit`."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; special tokens, and ids beyond the vocabulary, are left out."""

    @abstractmethod
    def id_of(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it."""

    @abstractmethod
    def save(self, folder: Path, processor_class: str | None = None) -> None:
        """Writes the files that `transformers` and `load_processor` read."""

    def _role(self, role: str) -> int | None:
        return self.id_of(self.special[role]) if role in self.special else None

    def _save_config(
        self, folder: Path, processor_class: str | None, added: Mapping[int, AddedToken]
    ) -> None:
        habits = self.habits
        config: dict[str, Any] = {
            **habits.options,
            **{f"{role}_token": token for role, token in self.special.items()},
            "added_tokens_decoder": {
                str(i): {
                    "content": token.content,
                    "lstrip": token.lstrip,
                    "normalized": token.normalized,
                    "rstrip": token.rstrip,
                    "single_word": token.single_word,
                    "special": token.special,
                }
                for i, token in sorted(added.items())
            },
            "extra_special_tokens": [
                token.content
                for token in added.values()
                if token.special and token.content not in self.special.values()
            ],
            "clean_up_tokenization_spaces": habits.clean_up,
            "model_input_names": list(habits.inputs),
            "padding_side": habits.padding_side,
            "truncation_side": habits.truncation_side,
            "tokenizer_class": habits.tokenizer_class,
        }
        if habits.max_length is not None:
            config["model_max_length"] = habits.max_length
        if processor_class is not None:
            config["processor_class"] = processor_class
        write_json(folder / "tokenizer_config.json", config)


def _checked(text: Any, name: str) -> str:
    if not isinstance(text, str):
        raise InputError(f"{name}: expected a text (str), found {type(text).__name__}.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{name}: half a surrogate pair is no text ({error}).") from error
    return text
