"""How a text is generated: the options, under the names and with the meaning of `transformers`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmjax.errors import InputError, near_misses

_DEFAULT_NEW_TOKENS = 20


@dataclass(frozen=True)
class GenerationConfig:
    """How to continue a prompt. A model carries one as its default, a call changes what it names.

    The fields are keys of a `generation_config.json`; `mmjax.weights.generation` lists those that
    are left out. Lengths count the prompt and its padding as well, but for `max_new_tokens`.
    """

    max_length: int | None = None  # where nothing is given, 20 tokens follow the prompt
    max_new_tokens: int | None = None  # wins over max_length
    min_length: int = 0  # no end token before
    repetition_penalty: float = 1.0  # above 1, tokens that stand there already become less likely

    do_sample: bool = False  # draw the next token; false: take the likeliest
    temperature: float = 1.0  # scores are divided by it, before drawing
    top_k: int = 50  # draw from this many of the likeliest tokens; 0: from all
    top_p: float = 1.0  # draw from the fewest tokens that have this probability together

    num_beams: int = 1  # above 1: beam search
    length_penalty: float = 1.0  # scores of beams are divided by length ** length_penalty
    # When a search is over: as soon as num_beams texts have ended (True), when a better one is not
    # to be expected (False), or when there can be none ('never').
    early_stopping: bool | str = False

    eos_token_id: tuple[int, ...] = ()  # each ends a text; a single one may be given as a number
    pad_token_id: int | None = None  # stands behind the end; None: the first of eos_token_id
    bos_token_id: int | None = None
    decoder_start_token_id: int | None = None  # what a caption starts from; None: bos_token_id

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        ends: Any = self.eos_token_id
        ends = () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)
        object.__setattr__(self, "eos_token_id", ends)
        for name, holds, expected in (
            ("max_length", self.max_length is None or self.max_length > 0, "above 0"),
            ("max_new_tokens", self.max_new_tokens is None or self.max_new_tokens > 0, "above 0"),
            ("min_length", self.min_length >= 0, "0 or above"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("temperature", self.temperature > 0, "above 0"),
            ("top_k", self.top_k >= 0, "0 or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("num_beams", self.num_beams > 0, "above 0"),
            ("num_beams", self.num_beams == 1 or not self.do_sample, "1 with do_sample"),
            ("early_stopping", self.early_stopping in (True, False, "never"), "a bool or 'never'"),
        ):
            if not holds:
                raise InputError(f"generation: {name} is {getattr(self, name)!r}, not {expected}.")

    def changed(self, options: Mapping[str, Any]) -> "GenerationConfig":
        """The same with some fields changed.

        Raises InputError for a name that is no field.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name in options:
            if name not in known:
                raise InputError(f"generate has no option {name!r}.{near_misses(name, known)}")
        if "max_length" in options and "max_new_tokens" not in options:
            options = {"max_new_tokens": None, **options}
        return dataclasses.replace(self, **options)

    @property
    def start(self) -> int:
        """The token that a text without a prompt starts from."""
        start = self.decoder_start_token_id
        start = self.bos_token_id if start is None else start
        if start is None:
            raise InputError(
                "generation needs a token to start from: give decoder_start_token_id or "
                "bos_token_id."
            )
        return start

    def length(self, prompt: int, positions: int) -> int:
        """How long texts may become, with a prompt of so many tokens, for so many positions.

        Raises InputError where that leaves nothing to generate, or there is nothing to start from.
        """
        if not prompt:
            raise InputError("the prompt is empty: start it with a token, as bos_token_id.")
        if self.max_new_tokens is not None:
            length = prompt + self.max_new_tokens
        elif self.max_length is not None:
            length = self.max_length
        else:
            length = min(prompt + _DEFAULT_NEW_TOKENS, positions)
        if length > positions:
            raise InputError(
                f"{length} tokens are asked for, the prompt's {prompt} among them, and the decoder "
                f"has {positions} positions: lower max_length or max_new_tokens."
            )
        if length <= prompt:
            raise InputError(
                f"the prompt has {prompt} tokens, which leaves none to generate of {length}: raise "
                "max_length, or give max_new_tokens."
            )
        if self.min_length > length:
            raise InputError(f"min_length is {self.min_length}, above the {length} there may be.")
        return length
