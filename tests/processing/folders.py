"""Folders with the vocabulary files of published tokenizers."""

import gzip
import json
import shutil
from pathlib import Path

PUBLISHED = {
    "bert": "BertTokenizer",
    "clip": "CLIPTokenizer",
    "roberta": "RobertaTokenizer",
    "gpt2": "GPT2Tokenizer",
    "t5": "T5Tokenizer",
    "siglip": "SiglipTokenizer",
}


def write(folder: Path, name: str, content: object) -> None:
    """One JSON file."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def write_published(source: Path, root: Path) -> None:
    """A folder for each of `PUBLISHED`: vocabulary files, and a config that names the class.

    GPT-2's is of RoBERTa's words, which are GPT-2's in another order, and that of T5 and SigLIP a
    SentencePiece model of the same kind as theirs.
    """
    for name, tokenizer_class in PUBLISHED.items():
        write(root / name, "tokenizer_config.json", {"tokenizer_class": tokenizer_class})
    shutil.copy(source / "bert-base-uncased-vocab.txt", root / "bert/vocab.txt")
    shutil.copy(source / "roberta-base-vocab.json", root / "roberta/vocab.json")
    for name in ("roberta", "gpt2"):
        shutil.copy(source / "roberta-base-merges.txt", root / name / "merges.txt")
    ids = json.loads((root / "roberta/vocab.json").read_text(encoding="utf-8"))
    special = {"<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>"}
    words = [word for word in sorted(ids, key=ids.get) if word not in special]
    write(root / "gpt2", "vocab.json", numbered([*words, "<|endoftext|>"]))
    _write_clip(source / "clip_bpe_simple_vocab_16e6.txt.gz", root / "clip")
    for name in ("t5", "siglip"):
        shutil.copy(source / "cc_all.32000.100extra.model", root / name / "spiece.model")


def numbered(tokens: list[str]) -> dict[str, int]:
    """The ids of tokens, by position."""
    return {token: i for i, token in enumerate(tokens)}


def _write_clip(source: Path, folder: Path) -> None:
    """OpenAI's one file as the two that a folder has."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in visible] + [chr(256 + n) for n in range(256 - len(visible))]
    lines = gzip.decompress(source.read_bytes()).decode().split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]
    tokens = letters + [f"{letter}</w>" for letter in letters]
    tokens += [merge.replace(" ", "") for merge in merges]
    write(folder, "vocab.json", numbered([*tokens, "<|startoftext|>", "<|endoftext|>"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
