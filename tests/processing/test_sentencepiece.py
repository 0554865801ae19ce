import struct

import numpy as np
import pytest

from mmjax.errors import InputError
from mmjax.processing import load_processor
from mmjax.processing.sentencepiece import Normalizer, SentencePieceModel
from tests.processing.folders import write

NORMAL, UNKNOWN, CONTROL = 1, 2, 3

PIECES = [
    ("<unk>", 0.0, UNKNOWN),
    ("</s>", 0.0, CONTROL),
    ("▁", -3.0, NORMAL),
    ("▁a", -2.0, NORMAL),
    ("▁do", -4.0, NORMAL),
    ("▁dog", -5.0, NORMAL),
    ("g", -6.0, NORMAL),
    ("s", -3.0, NORMAL),
    ("gs", -1.0, NORMAL),
    ("▁A", -3.0, NORMAL),
]
IDS = {text: i for i, (text, _, _) in enumerate(PIECES)}


# The file, written by the rules of protobuf's wire format.


def number(value):
    low = [value >> shift & 0x7F for shift in range(0, max(1, value.bit_length()), 7)]
    return bytes([*(byte | 0x80 for byte in low[:-1]), low[-1]])


def message(*fields):
    """A message of (number, value): an int is a varint, a float 4 bytes, the rest has a length."""
    written = b""
    for field, value in fields:
        match value:
            case int():
                written += number(field << 3) + number(value)
            case float():
                written += number(field << 3 | 5) + struct.pack("<f", value)
            case str() | bytes():
                value = value.encode() if isinstance(value, str) else value
                written += number(field << 3 | 2) + number(len(value)) + value
    return written


def spiece(pieces=PIECES, replacements=None, model_type=1, **spec):
    normalizer = [(2, charsmap(replacements))] if replacements else []
    normalizer += [
        ({"add_dummy_prefix": 3, "remove_extra_whitespaces": 4}[k], v) for k, v in spec.items()
    ]
    return message(
        *((1, message((1, text), (2, score), (3, kind))) for text, score, kind in pieces),
        (2, message((3, model_type), (4, 32000))),
        (3, message((1, "nmt"), *normalizer)),
    )


def charsmap(replacements):
    """A table of replacements: a double array with a block of 256 units for each node."""
    nodes = sorted({key.encode()[:n] for key in replacements for n in range(len(key.encode()) + 1)})
    base = {node: 256 * (i + 1) for i, node in enumerate(nodes)}
    units = [0] * (256 * (len(nodes) + 1))
    heap = b""
    for node in nodes:
        place = base[node[:-1]] ^ node[-1] if node else 0
        leaf = node.decode(errors="replace") in replacements
        units[place] = (place ^ base[node]) << 10 | leaf << 8 | (node[-1] if node else 0)
        if leaf:
            units[base[node]] = 1 << 31 | len(heap)
            heap += replacements[node.decode()].encode() + b"\0"
    trie = struct.pack(f"<{len(units)}I", *units)
    return struct.pack("<I", len(trie)) + trie + heap


@pytest.fixture
def path(tmp_path):
    return tmp_path / "spiece.model"


def read(path, **options):
    path.write_bytes(spiece(**options))
    return SentencePieceModel.read(path)


def test_the_file(path):
    model = read(path, replacements={"É": "e"}, add_dummy_prefix=0)
    assert [tuple(piece) for piece in model.pieces] == PIECES
    assert model.unknown_id == 0
    assert model.model_type == 1
    assert not model.add_dummy_prefix
    assert model.remove_extra_whitespaces  # as it is where the file is silent
    assert model.content == path.read_bytes()


def test_files_cut_short(path):
    content = spiece(replacements={"É": "e"})

    def is_read(length):
        path.write_bytes(content[:length])
        try:
            return bool(SentencePieceModel.read(path))
        except InputError:
            return False

    assert is_read(len(content))
    assert not is_read(len(content) - 1)
    # A file may end behind any piece and still be one; nothing but InputError comes of the rest.
    assert 0 < sum(is_read(length) for length in range(150)) < len(PIECES) + 2


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80" * 40, b"\x0a\xff\xff\xff\xff\x0f", b"PK\x03\x04 an archive", spiece(PIECES[1:])],
)
def test_files_of_another_kind(path, content):
    path.write_bytes(content)
    with pytest.raises(InputError, match="no SentencePiece model"):
        SentencePieceModel.read(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a dog", "▁a▁dog"),
        ("  a   dog  ", "▁a▁dog"),
        ("", ""),
        ("   ", ""),
        ("Éa", "▁ea"),
        ("E\u0301a", "▁Ea"),  # the longest entry wins over that of E
        ("Ea", "▁Fa"),
        ("a\u00a0b", "▁a▁b"),
        ("a\u200bb", "▁ab"),
        ("日É本", "▁日e本"),
        ("a▁", "▁a"),
    ],
)
def test_normalisation(path, text, expected):
    replacements = {"É": "e", "E\u0301": "E", "E": "F", "\u00a0": " ", "\u200b": ""}
    assert Normalizer(read(path, replacements=replacements), "file")(text) == expected


def test_normalisation_as_the_file_asks_for_it(path):
    assert Normalizer(read(path, add_dummy_prefix=0), "file")(" a  b ") == "a▁b"
    kept = read(path, remove_extra_whitespaces=0)
    assert Normalizer(kept, "file")(" a  b ") == "▁▁a▁▁b▁"


@pytest.mark.parametrize(
    "table", [b"\x04", b"\xff\xff\xff\xff1234", b"\x00\x00\x00\x00", b"\3\0\0\0abc"]
)
def test_broken_tables(path, table):
    path.write_bytes(message((1, message((1, "<unk>"), (3, UNKNOWN))), (3, message((2, table)))))
    with pytest.raises(InputError, match="table of replaced characters"):
        Normalizer(SentencePieceModel.read(path), "file")


# SigLIP.


@pytest.fixture
def siglip(path):
    def load(content=None, **config):
        path.write_bytes(spiece() if content is None else content)
        write(path.parent, "tokenizer_config.json", {"tokenizer_class": "SiglipTokenizer"} | config)
        return load_processor(path.parent)

    return load


def ids(*pieces):
    return [IDS[piece] for piece in pieces]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a dog", ["▁a", "▁dog"]),
        ("dogs", ["▁do", "gs"]),  # -5 rather than -8 for ▁dog s
        ("A  DOG!", ["▁a", "▁dog"]),
        ("a-.,dogs\n", ["▁a", "<unk>", "gs"]),  # without punctuation one word: adogs
        (" a", ["▁", "▁a"]),
        ("日本 a", ["▁", "<unk>", "▁a"]),
        ("a <unk> s", ["▁a", "<unk>", "s"]),  # nothing is put before what follows a special token
        ("a </s> gs </s>", ["▁a", "</s>", "gs"]),
        ("a </s> dog", ["▁a", "</s>", "g"]),  # unknown letters there are lost: transformers' way
        ("", []),
        ("...", []),
    ],
)
def test_siglip(siglip, text, pieces):
    assert siglip().tokenizer.encode_text(text)[0] == ids(*pieces, "</s>")


def test_siglip_pads_with_its_end_to_64(siglip):
    processor = siglip()
    batch = processor(text=["a dog", "a " * 100])
    assert batch["text"][0].tolist() == ids("▁a", "▁dog") + [IDS["</s>"]] * 62
    assert batch["text"][1].tolist() == ids("▁a") * 63 + ids("</s>")
    assert batch["text_mask"].sum(axis=1).tolist() == [3, 64]
    assert "text_type" not in batch
    assert processor(text="a", length=2)["text"].tolist() == [ids("▁a", "</s>")]
    assert processor.decode(batch["text"]) == ["a dog", " ".join("a" * 63)]


def test_siglip_options(siglip):
    assert siglip(do_lower_case=False).tokenizer.encode_text("A")[0] == ids("▁A", "</s>")
    batch = siglip(model_input_names=["input_ids"], model_max_length=5)(text="a")
    assert batch.keys() == {"text"}  # it attends to padding, as it did in training
    assert batch["text"].shape == (1, 5)
    left = siglip(truncation_side="left").tokenizer.encode_text("a dog", None, 2)[0]
    assert left == ids("▁dog", "</s>")
    added = siglip(additional_special_tokens=["[X]"]).tokenizer
    assert added.vocabulary_size == len(PIECES) + 1
    assert added.encode_text("a[X]")[0] == [*ids("▁a"), len(PIECES), *ids("</s>")]


def test_siglip_comes_back(siglip, tmp_path):
    processor = siglip(do_lower_case=False, model_max_length=9)
    processor.save(tmp_path / "saved")
    again = load_processor(tmp_path / "saved")
    assert again.tokenizer.habits == processor.tokenizer.habits
    text = ["A dogs </s>", "a"]
    np.testing.assert_array_equal(again(text=text)["text"], processor(text=text)["text"])


def test_siglip_cannot(siglip):
    with pytest.raises(InputError, match="no pairs"):
        siglip()(text=["a"], text_pair=["a"])
    with pytest.raises(InputError, match="another kind"):
        siglip(spiece(model_type=2))
    with pytest.raises(InputError, match="eos_token"):
        siglip(spiece(PIECES[:1] + PIECES[2:]), eos_token=None)


def test_models_that_nothing_explains(siglip, path):
    with pytest.raises(InputError, match=r"tokenizer_class.*SiglipTokenizer or T5Tokenizer"):
        siglip(tokenizer_class=None)
    (path.parent / "other.model").write_bytes(spiece())
    path.rename(path.parent / "one.model")
    with pytest.raises(InputError, match=r"several SentencePiece models: one\.model, other\.model"):
        load_processor(path.parent)
