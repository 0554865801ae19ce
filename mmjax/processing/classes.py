"""The tokenizer classes of the families: how each is put together from a vocabulary."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

Options = Mapping[str, Any]
Special = Mapping[str, str]  # role ('pad', 'cls', …) → the token as the vocabulary spells it

T5_EXTRA_IDS = 100  # sentinel tokens behind the pieces of T5's vocabulary

_CLIP_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


@dataclass(frozen=True)
class Vocabulary:
    """What a folder says about the tokens themselves, from whichever of its files."""

    ids: Mapping[str, int] = field(default_factory=dict)  # of WordPiece and byte-pair encoding
    merges: list[tuple[str, str]] = field(default_factory=list)  # of byte-pair encoding
    scores: list[tuple[str, float]] = field(default_factory=list)  # of a unigram model
    charsmap: bytes = b""  # SentencePiece's table of replaced characters
    extra: list[AddedToken] = field(default_factory=list)  # SentencePiece's own special tokens
    template: processors.PostProcessor | None = None  # where special tokens go, if a file says


@dataclass(frozen=True)
class TokenizerClass:
    """A class of `transformers`: the kind of vocabulary, its special tokens, its parts."""

    model: str  # 'WordPiece', 'BPE' or 'Unigram'
    special: dict[str, str]  # by role; a file may rename them
    build: Callable[[Vocabulary, Special, Options], Tokenizer]
    template: Callable[[Tokenizer, Vocabulary, Special, Options], processors.PostProcessor]
    inputs: tuple[str, ...] = ("input_ids", "attention_mask")
    padding_side: str = "right"
    options: tuple[str, ...] = ()  # the keys of `tokenizer_config.json` that matter to it


def _bert(vocabulary: Vocabulary, special: Special, options: Options) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(dict(vocabulary.ids), unk_token=special["unk"]))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=options.get("tokenize_chinese_chars", True),
        strip_accents=options.get("strip_accents"),
        lowercase=options.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _clip(vocabulary: Vocabulary, special: Special, options: Options) -> Tokenizer:
    tokenizer = Tokenizer(
        models.BPE(
            dict(vocabulary.ids),
            vocabulary.merges,
            unk_token=special["unk"],
            end_of_word_suffix="</w>",
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_level(vocabulary: Vocabulary, special: Special, options: Options) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(dict(vocabulary.ids), vocabulary.merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=options.get("add_prefix_space", False)
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _t5(vocabulary: Vocabulary, special: Special, options: Options) -> Tokenizer:
    scores = list(vocabulary.scores)
    if not any(token == "<extra_id_0>" for token, _ in scores):
        count = options.get("extra_ids", T5_EXTRA_IDS)
        scores += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(count))]
    # T5's unknown token is its third, and `transformers` takes the third in any vocabulary.
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=2, byte_fallback=False))
    if vocabulary.charsmap:
        tokenizer.normalizer = normalizers.Precompiled(vocabulary.charsmap)
    metaspace: dict[str, Any] = {"replacement": "▁", "prepend_scheme": "always", "split": True}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**metaspace)]
    )
    tokenizer.decoder = decoders.Metaspace(**metaspace)
    return tokenizer


def _gemma(vocabulary: Vocabulary, special: Special, options: Options) -> Tokenizer:
    tokenizer = Tokenizer(
        models.BPE(
            dict(vocabulary.ids),
            vocabulary.merges,
            unk_token=special["unk"],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def _siglip2(vocabulary: Vocabulary, special: Special, options: Options) -> Tokenizer:
    tokenizer = _gemma(vocabulary, special, options)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), tokenizer.normalizer])
    return tokenizer


def _numbered(tokenizer: Tokenizer, token: str) -> tuple[str, int]:
    """A special token and its id; it has one, because it was added where it was missing."""
    i = tokenizer.token_to_id(token)
    assert i is not None
    return token, i


def _bert_template(
    tokenizer: Tokenizer, vocabulary: Vocabulary, special: Special, options: Options
) -> processors.PostProcessor:
    begin, end = special["cls"], special["sep"]
    return processors.TemplateProcessing(
        single=f"{begin}:0 $A:0 {end}:0",
        pair=f"{begin}:0 $A:0 {end}:0 $B:1 {end}:1",
        special_tokens=[_numbered(tokenizer, token) for token in (begin, end)],
    )


def _clip_template(
    tokenizer: Tokenizer, vocabulary: Vocabulary, special: Special, options: Options
) -> processors.PostProcessor:
    end, begin = (_numbered(tokenizer, special[role]) for role in ("eos", "bos"))
    return processors.RobertaProcessing(end, begin)


def _roberta_template(
    tokenizer: Tokenizer, vocabulary: Vocabulary, special: Special, options: Options
) -> processors.PostProcessor:
    end, begin = (_numbered(tokenizer, special[role]) for role in ("sep", "cls"))
    return processors.RobertaProcessing(end, begin)


def _t5_template(
    tokenizer: Tokenizer, vocabulary: Vocabulary, special: Special, options: Options
) -> processors.PostProcessor:
    end = special["eos"]
    return processors.TemplateProcessing(
        single=["$A", end],
        pair=["$A", end, "$B", end],
        special_tokens=[_numbered(tokenizer, end)],
    )


def _given_template(
    tokenizer: Tokenizer, vocabulary: Vocabulary, special: Special, options: Options
) -> processors.PostProcessor:
    """That of `tokenizer.json`; without it, a beginning and an end as the options ask for."""
    if vocabulary.template is not None:
        return vocabulary.template
    begin = special["bos"] if options.get("add_bos_token") else None
    end = special["eos"] if options.get("add_eos_token") else None

    def around(text: str, number: int) -> list[str]:
        return [f"{part}:{number}" for part in (begin, text, end) if part is not None]

    return processors.TemplateProcessing(
        single=around("$A", 0),
        pair=around("$A", 0) + around("$B", 1),
        special_tokens=[_numbered(tokenizer, t) for t in (begin, end) if t is not None],
    )


_BERT = TokenizerClass(
    "WordPiece",
    {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"},
    _bert,
    _bert_template,
    inputs=("input_ids", "token_type_ids", "attention_mask"),
    options=("do_lower_case", "strip_accents", "tokenize_chinese_chars"),
)
_GEMMA_SPECIAL = {
    "bos": "<bos>",
    "eos": "<eos>",
    "unk": "<unk>",
    "pad": "<pad>",
    "mask": "<mask>",
}
_END = "<|endoftext|>"

CLASSES = {
    "BertTokenizer": _BERT,
    "LxmertTokenizer": _BERT,
    "CLIPTokenizer": TokenizerClass(
        "BPE",
        {"bos": "<|startoftext|>", "eos": _END, "unk": _END, "pad": _END},
        _clip,
        _clip_template,
    ),
    "GPT2Tokenizer": TokenizerClass(
        "BPE",
        {"bos": _END, "eos": _END, "unk": _END},
        _byte_level,
        _given_template,
        options=("add_prefix_space", "add_bos_token", "add_eos_token"),
    ),
    "RobertaTokenizer": TokenizerClass(
        "BPE",
        {
            "bos": "<s>",
            "eos": "</s>",
            "unk": "<unk>",
            "sep": "</s>",
            "pad": "<pad>",
            "cls": "<s>",
            "mask": "<mask>",
        },
        _byte_level,
        _roberta_template,
        options=("add_prefix_space",),
    ),
    "T5Tokenizer": TokenizerClass(
        "Unigram",
        {"eos": "</s>", "unk": "<unk>", "pad": "<pad>"},
        _t5,
        _t5_template,
        options=("extra_ids",),
    ),
    "GemmaTokenizer": TokenizerClass(
        "BPE",
        _GEMMA_SPECIAL,
        _gemma,
        _given_template,
        padding_side="left",
        options=("add_bos_token", "add_eos_token"),
    ),
    "Siglip2Tokenizer": TokenizerClass(
        "BPE",
        _GEMMA_SPECIAL,
        _siglip2,
        _given_template,
        padding_side="left",
        options=("add_bos_token", "add_eos_token"),
    ),
}
