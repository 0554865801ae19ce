"""`generation_config.json`: how a model generates where a call does not say."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmjax.decoding import GenerationConfig
from mmjax.errors import InputError
from mmjax.json_files import read_json
from mmjax.weights.family import Source
from mmjax.weights.keys import Key, read_keys, write_keys

FILE = "generation_config.json"

KEYS = (
    Key("max_length", "max_length", None),
    Key("max_new_tokens", "max_new_tokens", None),
    Key("min_length", "min_length", 0),
    Key("repetition_penalty", "repetition_penalty", 1.0),
    Key("do_sample", "do_sample", False),
    Key("temperature", "temperature", 1.0),
    Key("top_k", "top_k", 50),
    Key("top_p", "top_p", 1.0),
    Key("num_beams", "num_beams", 1),
    Key("length_penalty", "length_penalty", 1.0),
    Key("early_stopping", "early_stopping", False, {False: False, True: True, "never": "never"}),
    Key("eos_token_id", "eos_token_id", None),
    Key("pad_token_id", "pad_token_id", None),
    Key("bos_token_id", "bos_token_id", None),
    Key("decoder_start_token_id", "decoder_start_token_id", None),
)

# Options that change what is generated and that we have not, with the values that change nothing.
_MISSING: Mapping[str, Any] = {
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": [],
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "penalty_alpha": 0.0,
    "typical_p": 1.0,
    "min_p": 0.0,
    "renormalize_logits": False,
    "num_return_sequences": 1,
}


def read_generation(source: Source) -> GenerationConfig:
    """The file beside a config.json; where there is none, what the config.json itself says.

    There old files have it, of the whole model or of its decoder. Options that we have not are
    logged and left out.
    """
    path = Path(source.origin).with_name(FILE)
    if path.exists():
        origin, found = str(path), _given(read_json(path))
    else:
        decoder = source.json.get("decoder") or source.json.get("text_config") or {}
        origin, found = source.origin, {**_given(decoder), **_given(source.json)}
    for name, neutral in _MISSING.items():
        if found.get(name, neutral) != neutral:
            logging.warning(
                "%s: %s is %r, which generation here leaves out", origin, name, found[name]
            )
    try:
        return GenerationConfig(**read_keys(KEYS, found, origin))
    except InputError as error:
        raise InputError(f"{origin}: {error}") from error


def write_generation(config: GenerationConfig) -> dict[str, Any]:
    """What the file says."""
    return _given(write_keys(KEYS, config))


def _given(json: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in json.items() if value is not None}
