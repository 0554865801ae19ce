"""Reading a folder's tokenizer: its class, its special tokens and its habits."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from mmjax.errors import InputError
from mmjax.json_files import find_json
from mmjax.processing.classes import CLASSES, T5_EXTRA_IDS
from mmjax.processing.fast import FastTokenizer, as_input_error
from mmjax.processing.sentencepiece import SentencePieceModel
from mmjax.processing.siglip import SiglipTokenizer
from mmjax.processing.special_tokens import SpecialTokens
from mmjax.processing.tokenizer import Habits, PretrainedTokenizer, Side
from mmjax.processing.vocabularies import TokenizerFiles

# A tokenizer of no class that is known: its `tokenizer.json` says all.
_GENERIC = "PreTrainedTokenizerFast"
_SIGLIP = "SiglipTokenizer"
_SIGLIP_SPECIAL = {"eos": "</s>", "unk": "<unk>", "pad": "</s>"}

# The class where the folder does not name it, by the model's family.
_CLASS_OF_FAMILY = {
    **dict.fromkeys(
        ("bert", "lxmert", "visual_bert", "vilt", "flava", "blip", "align"), "BertTokenizer"
    ),
    **dict.fromkeys(("roberta", "bridgetower"), "RobertaTokenizer"),
    "clip": "CLIPTokenizer",
    "gpt2": "GPT2Tokenizer",
    "siglip": _SIGLIP,
    "siglip2": "Siglip2Tokenizer",
    "t5": "T5Tokenizer",
}
# Classes that tell the family.
_FAMILY_OF_CLASS = {"CLIPTokenizer": "clip", _SIGLIP: "siglip", "Siglip2Tokenizer": "siglip2"}
# Families that pad texts to one length: that of the tokenizer, or this where it has none.
_FIXED_LENGTHS = {"clip": 77, "siglip": 64, "siglip2": 64}
_ALIGN_LENGTH = 64  # whatever the tokenizer's own is

_UNLIMITED = 10**9  # a longer model_max_length means that there is none


def load_tokenizer(
    folder: Path, model_config: Mapping[str, Any], family: str
) -> PretrainedTokenizer | None:
    """The tokenizer of a folder; None where there is no vocabulary.

    Args:
      folder: the folder.
      model_config: its `config.json`, which may be empty.
      family: the model's family as `config.json` spells it; any other word where it is unknown.

    Raises:
      InputError: a file is missing or broken, or they do not go together.
    """
    files = TokenizerFiles.find(folder)
    if files is None:
        return None
    name = _class(files, model_config, family)
    if family not in _FIXED_LENGTHS:
        family = _FAMILY_OF_CLASS.get(name, family)
    builders = {_GENERIC: _generic, _SIGLIP: _siglip}
    with as_input_error(f"{folder}: the {name} cannot be put together"):
        tokenizer = builders.get(name, _of_class)(files, name, family)
        tokenizer.encode_text("a")  # some faults show up only in use
    return tokenizer


def _class(files: TokenizerFiles, model_config: Mapping[str, Any], family: str) -> str:
    """The class of `transformers` that reads the folder."""
    parts = [model_config.get("text_config"), model_config.get("decoder")]
    families = [family, *(part.get("model_type") for part in parts if isinstance(part, dict))]
    if model_config.get("model_type") == "siglip2":
        return "Siglip2Tokenizer"  # its folders name GemmaTokenizer, which keeps capitals
    named = files.config.get("tokenizer_class") or model_config.get("tokenizer_class")
    named = named or next((_CLASS_OF_FAMILY[f] for f in families if f in _CLASS_OF_FAMILY), None)
    name = str(named or _class_by_files(files)).removesuffix("Fast")
    if name in CLASSES or (name == _SIGLIP and files.sentencepiece()):
        return name
    if files.tokenizer is None:
        raise InputError(
            f"{files.folder}: a {name} is read from tokenizer.json, which is missing. Without it, "
            f"there are {', '.join(sorted([*CLASSES, _SIGLIP]))}."
        )
    return _GENERIC


def _class_by_files(files: TokenizerFiles) -> str:
    if files.tokenizer is not None:
        return _GENERIC
    if (files.folder / "vocab.txt").is_file():
        return "BertTokenizer"
    tokens = find_json(files.folder / "vocab.json")
    if tokens is None:
        raise InputError(
            f"{files.folder}: nothing tells how its SentencePiece model is used. Write a "
            'tokenizer_config.json with "tokenizer_class": SiglipTokenizer or T5Tokenizer.'
        )
    if "<|startoftext|>" in tokens:
        return "CLIPTokenizer"
    return "RobertaTokenizer" if "<s>" in tokens else "GPT2Tokenizer"


def _of_class(files: TokenizerFiles, name: str, family: str) -> FastTokenizer:
    """A tokenizer put together as its class does, whichever file the vocabulary is from."""
    parts = CLASSES[name]
    habits = _habits(files, name, family, parts.inputs, parts.padding_side, parts.options)
    vocabulary = files.vocabulary(parts.model)
    special = SpecialTokens.read(files, parts.special)
    for role in parts.special.keys() - special.roles.keys() - {"pad", "mask"}:
        raise InputError(f"{files.folder}: {role}_token is null, which a {name} cannot do without.")
    if parts.model == "WordPiece" and special.roles["unk"].content not in vocabulary.ids:
        unknown = special.roles["unk"].content
        raise InputError(f"{files.folder}: the vocabulary has no {unknown}, for unknown words.")
    if name == "T5Tokenizer" and not special.others:
        special = special.with_others(
            _t5_others(vocabulary.extra, habits.options.get("extra_ids", T5_EXTRA_IDS))
        )
    tokenizer = parts.build(vocabulary, special.spelled(), habits.options)
    special.add_to(tokenizer)
    tokenizer.post_processor = parts.template(
        tokenizer, vocabulary, special.spelled(), habits.options
    )
    return FastTokenizer(tokenizer, habits, special.spelled())


def _generic(files: TokenizerFiles, name: str, family: str) -> FastTokenizer:
    """The tokenizer that `tokenizer.json` describes, as it stands."""
    content = files.tokenizer or {}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    padding = (content.get("padding") or {}).get("pad_token")
    special = SpecialTokens.read(files, {} if padding is None else {"pad": padding})
    special.add_to(tokenizer)
    return FastTokenizer(tokenizer, _habits(files, name, family), special.spelled())


def _siglip(files: TokenizerFiles, name: str, family: str) -> SiglipTokenizer:
    path = files.sentencepiece()
    assert path is not None
    special = SpecialTokens.read(files, _SIGLIP_SPECIAL, lstrip=True, rstrip=True)
    return SiglipTokenizer(
        SentencePieceModel.read(path),
        _habits(files, name, family, options=("do_lower_case",)),
        special.spelled(),
        special.all(),
        origin=str(path),
    )


def _t5_others(marked: Sequence[AddedToken], count: int) -> list[AddedToken]:
    """T5's sentinel tokens, and what the SentencePiece model marks as special."""
    if any("<extra_id_" in token.content for token in marked):
        return list(marked)
    return [*marked, *(AddedToken(f"<extra_id_{i}>", special=True) for i in range(count))]


def _habits(
    files: TokenizerFiles,
    name: str,
    family: str,
    inputs: Sequence[str] = ("input_ids", "attention_mask"),
    padding_side: str = "right",
    options: Sequence[str] = (),
) -> Habits:
    """The habits in `tokenizer_config.json`; where it is silent, those of the class."""
    config, origin = files.config, files.folder / "tokenizer_config.json"
    limit = config.get("model_max_length")
    if limit is not None and (not isinstance(limit, int | float) or limit < 1):
        raise InputError(f"{origin}: model_max_length is a number of tokens, not {limit!r}.")
    inputs = config.get("model_input_names", inputs)
    if isinstance(inputs, str) or not isinstance(inputs, Sequence):
        raise InputError(f"{origin}: model_input_names is a list of names, not {inputs!r}.")
    limit = None if limit is None or limit > _UNLIMITED else int(limit)
    if family == "align":
        fixed: int | None = _ALIGN_LENGTH
    else:
        usual = _FIXED_LENGTHS.get(family)
        fixed = usual and (limit or usual)
    if family == "blip":  # its text model is a BERT without token types
        inputs = [each for each in inputs if each != "token_type_ids"]
    return Habits(
        tokenizer_class=name,
        max_length=limit,
        fixed_length=fixed,
        padding_side=_side(files, "padding", padding_side),
        truncation_side=_side(files, "truncation", "right"),
        inputs=tuple(inputs),
        clean_up=config.get("clean_up_tokenization_spaces") is True,
        options={key: config[key] for key in options if config.get(key) is not None},
    )


def _side(files: TokenizerFiles, what: str, usual: str) -> Side:
    """Where texts are padded or cut; `tokenizer.json` may know where the config does not."""
    own = ((files.tokenizer or {}).get(what) or {}).get("direction", usual)
    side = files.config.get(f"{what}_side", own)
    match str(side).lower():
        case "left":
            return "left"
        case "right":
            return "right"
    raise InputError(f"{files.folder}: {what}_side is 'left' or 'right', not {side!r}.")
