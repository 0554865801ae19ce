import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mmjax.errors import InputError
from mmjax.processing import load_processor
from tests.processing.folders import numbered, write

BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "run", "##s", "cafe", ",", "犬"]


def tokens(processor, ids):
    names = {processor.tokenizer.id_of(token): token for token in BERT}
    return [names[i] for i in np.asarray(ids).tolist()]


@pytest.fixture
def bert(tmp_path):
    """A function: the processor of BERT's small vocabulary with some config."""
    (tmp_path / "vocab.txt").write_text("\n".join(BERT) + "\n", encoding="utf-8")

    def load(**config):
        write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "BertTokenizer"} | config)
        return load_processor(tmp_path)

    return load


def test_bert_pads_to_the_longest(bert):
    processor = bert()
    batch = processor(text=["A dog runs", "CAFÉ"])
    assert batch.keys() == {"text", "text_mask", "text_type"}
    assert batch["text"].dtype == batch["text_type"].dtype == np.int32
    assert batch["text_mask"].dtype == bool
    assert tokens(processor, batch["text"][0]) == ["[CLS]", "a", "dog", "run", "##s", "[SEP]"]
    assert tokens(processor, batch["text"][1]) == ["[CLS]", "cafe", "[SEP]"] + ["[PAD]"] * 3
    assert batch["text_mask"].sum(axis=1).tolist() == [6, 3]
    assert not batch["text_type"].any()


def test_bert_cuts_to_its_length_and_to_a_given_one(bert):
    processor = bert(model_max_length=5)
    assert tokens(processor, processor(text="a dog runs , a")["text"][0])[3:] == ["run", "[SEP]"]
    assert processor(text="a dog runs , a")["text"].shape == (1, 5)
    assert processor(text="a")["text"].shape == (1, 3)
    longer = processor(text=["a dog runs , a"], length=9)["text"]
    assert tokens(processor, longer[0])[5:] == [",", "a", "[SEP]", "[PAD]"]
    assert tokens(processor, processor(text="a dog", length=2)["text"][0]) == ["[CLS]", "[SEP]"]


def test_pairs_are_one_sequence_of_two_types(bert):
    processor = bert()
    batch = processor(text=["a dog", "a"], text_pair=["runs", "a"])
    assert tokens(processor, batch["text"][0]) == [
        *("[CLS]", "a", "dog", "[SEP]"),
        *("run", "##s", "[SEP]"),
    ]
    assert batch["text_type"].tolist() == [[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0]]


@pytest.mark.parametrize(
    ("first", "second", "length", "kept"),
    [
        (4, 4, 11, (4, 4)),
        (4, 4, 9, (3, 3)),
        (4, 4, 8, (2, 3)),
        (1, 7, 9, (1, 5)),
        (7, 1, 9, (5, 1)),
        (7, 2, 6, (2, 1)),
        (3, 0, 4, (1, 0)),
    ],
)
def test_the_longer_of_a_pair_is_cut_first(bert, first, second, length, kept):
    batch = bert()(text=["dog " * first], text_pair=["dog " * second], length=length)
    dogs = batch["text"][0] == BERT.index("dog")
    first_half = batch["text_type"][0] == 0
    assert (dogs[first_half].sum(), dogs[~first_half].sum()) == kept


def test_sides_of_padding_and_cutting(bert):
    processor = bert(padding_side="left", truncation_side="left", model_max_length=4)
    batch = processor(text=["a dog run", "a"])
    assert tokens(processor, batch["text"][0]) == ["[CLS]", "dog", "run", "[SEP]"]
    assert tokens(processor, batch["text"][1]) == ["[PAD]", "[CLS]", "a", "[SEP]"]
    assert batch["text_mask"][1].tolist() == [False, True, True, True]


def test_case_accents_and_chinese_are_as_configured(bert):
    def read(**config):
        processor = bert(**config)
        return tokens(processor, processor(text="Dog CAFÉ a犬a")["text"][0])[1:-1]

    assert read() == ["dog", "cafe", "a", "犬", "a"]
    assert read(do_lower_case=False) == ["[UNK]", "[UNK]", "a", "犬", "a"]
    assert read(strip_accents=False) == ["dog", "[UNK]", "a", "犬", "a"]
    assert read(tokenize_chinese_chars=False) == ["dog", "cafe", "[UNK]"]


def test_special_tokens_that_a_text_spells_out_are_special(bert):
    processor = bert()
    assert tokens(processor, processor(text="a [MASK] dog[SEP]")["text"][0])[1:-1] == [
        *("a", "[MASK]", "dog", "[SEP]")
    ]


def test_added_tokens_follow_the_vocabulary(bert):
    added = {"12": {"content": "[DEC]", "special": True}, "13": {"content": "New York"}}
    processor = bert(added_tokens_decoder=added, additional_special_tokens=["[DEC]", "[ENC]"])
    assert processor.tokenizer.vocabulary_size == 15
    assert processor(text="a new york [DEC][ENC]")["text"][0].tolist() == [2, 5, 13, 12, 14, 3]
    assert processor.decode([2, 5, 13, 12, 14, 3]) == "a new york"


def test_ids_of_special_tokens(bert):
    tokenizer = bert().tokenizer
    ids = (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id)
    assert ids == (0, 1, 2, 3)
    assert tokenizer.mask_id == 4
    assert tokenizer.bos_id is tokenizer.eos_id is None
    assert tokenizer.vocabulary_size == len(BERT)


def test_decoding_leaves_out_special_and_unknown_ids(bert):
    processor = bert()
    assert processor.decode([2, 6, 7, 8, 3, 0, 0]) == "dog runs"
    assert processor.decode(np.array([[2, 6, 3], [2, 99, 9]])) == ["dog", "cafe"]
    assert processor.decode([6, 10, 6]) == "dog, dog"
    assert processor.decode([]) == ""
    for ids in ([-1], [1.5], [[[1]]], [[1, 2], [3]], "dog"):
        with pytest.raises(InputError, match=r"[Ii]ds"):
            processor.decode(ids)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ([3], r"text\[0\].*int"),
        (["a", None], r"text\[1\].*NoneType"),
        ([b"a"], r"text\[0\].*bytes"),
        (b"a", "list of texts, found bytes"),
        (3, "list of texts, found int"),
        ([], "empty"),
        (["\ud83d"], r"text\[0\].*surrogate"),
    ],
)
def test_what_is_no_text(bert, text, message):
    with pytest.raises(InputError, match=message):
        bert()(text=text)


def test_pairs_that_are_none(bert):
    with pytest.raises(InputError, match="2 texts and 1 second"):
        bert()(text=["a", "a"], text_pair=["a"])
    with pytest.raises(InputError, match=r"text_pair\[0\]"):
        bert()(text=["a"], text_pair=[None])
    with pytest.raises(InputError, match=r"no room for the special tokens.*are 3"):
        bert()(text=["a"], text_pair=["a"], length=2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"padding_side": "top"}, "padding_side is 'left' or 'right'"),
        ({"model_max_length": "long"}, "model_max_length is a number"),
        ({"model_input_names": "input_ids"}, "model_input_names is a list"),
        ({"mask_token": 4}, "a special token is a text"),
        ({"mask_token": {"content": "[MASK]", "lstrip": "yes"}}, "flags of '\\[MASK\\]'"),
        ({"cls_token": None}, "cls_token is null"),
        ({"unk_token": "[WHAT]"}, "no \\[WHAT\\], for unknown words"),
        ({"added_tokens_decoder": {"x": "[A]"}}, "tokens by their ids"),
        ({"do_lower_case": "yes"}, "cannot be put together"),
        ({"tokenizer_class": "CLIPTokenizer"}, "vocab.json and merges.txt"),
        ({"tokenizer_class": "FooTokenizer"}, "FooTokenizer is read from tokenizer.json"),
    ],
)
def test_configs_that_cannot_be_meant(bert, config, message):
    with pytest.raises(InputError, match=message):
        bert(**config)


def test_threads_share_a_tokenizer(bert):
    processor = bert()
    lengths = [3, 5, 9, 17] * 50
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda n: processor(text=["a dog"], length=n)["text"], lengths))
    for array, length in zip(found, lengths, strict=True):
        assert array.shape == (1, length)
        np.testing.assert_array_equal(array, processor(text=["a dog"], length=length)["text"])


# Byte-pair encoding.

MERGES = ["d o", "do g", "Ġ dog"]


def byte_pairs(folder, extra, merges=MERGES, end=""):
    letters = ["a", "d", "o", "g", "s", "Ġ", "Ā"]  # Ā is byte 0
    words = [merge.replace(" ", "") for merge in merges]
    vocabulary = [*letters, *(letter + end for letter in letters if end), *words, *extra]
    write(folder, "vocab.json", numbered(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return numbered(vocabulary)


def test_gpt2(tmp_path):
    ids = byte_pairs(tmp_path, ["<|endoftext|>"])
    processor = load_processor(tmp_path)
    assert processor.tokenizer.habits.tokenizer_class == "GPT2Tokenizer"
    batch = processor(text=["dog dogs", "a"])
    assert batch.keys() == {"text", "text_mask"}
    expected = [ids["dog"], ids["Ġdog"], ids["s"]]
    assert batch["text"][0].tolist() == expected
    # There is no token for padding; the end stands in for it.
    assert batch["text"][1].tolist() == [ids["a"], ids["<|endoftext|>"], ids["<|endoftext|>"]]
    assert batch["text_mask"][1].tolist() == [True, False, False]
    assert processor.decode([*expected, ids["<|endoftext|>"]]) == "dog dogs"


def test_gpt2_options(tmp_path):
    ids = byte_pairs(tmp_path, ["<|endoftext|>"])
    config = {"add_prefix_space": True, "add_bos_token": True, "pad_token": "<|pad|>"}
    write(tmp_path, "tokenizer_config.json", config)
    processor = load_processor(tmp_path)
    assert processor.tokenizer.pad_id == len(ids)
    text = processor(text="dog", text_pair="a")["text"][0].tolist()
    assert text == [ids["<|endoftext|>"], ids["Ġdog"], ids["<|endoftext|>"], ids["Ġ"], ids["a"]]


def test_roberta(tmp_path):
    ids = byte_pairs(tmp_path, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    processor = load_processor(tmp_path)
    assert processor.tokenizer.habits.tokenizer_class == "RobertaTokenizer"
    batch = processor(text=["dog dog"], text_pair=["a<mask>"], length=9)
    spelled = ["<s>", "dog", "Ġdog", "</s>", "</s>", "a", "<mask>", "</s>", "<pad>"]
    assert batch["text"][0].tolist() == [ids[token] for token in spelled]
    assert "text_type" not in batch


def test_clip_pads_to_its_length(tmp_path):
    ids = byte_pairs(tmp_path, ["<|startoftext|>", "<|endoftext|>"], ["d o", "do g</w>"], "</w>")
    processor = load_processor(tmp_path)
    assert processor.tokenizer.habits.tokenizer_class == "CLIPTokenizer"
    batch = processor(text=["A  DOG", "dog " * 99])
    start, end, dog = ids["<|startoftext|>"], ids["<|endoftext|>"], ids["dog</w>"]
    assert batch["text"].shape == (2, 77)
    assert batch["text"][0].tolist() == [start, ids["a</w>"], dog] + [end] * 74
    assert batch["text_mask"].sum(axis=1).tolist() == [4, 77]
    assert batch["text"][1].tolist() == [start] + [dog] * 75 + [end]
    assert processor(text="dog", length=4)["text"].shape == (1, 4)
    assert processor.decode(batch["text"][0]) == "a dog"
    write(tmp_path, "tokenizer_config.json", {"model_max_length": 20})
    assert load_processor(tmp_path)(text="dog")["text"].shape == (1, 20)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("merges.txt", "d o\ndo g x\n", "merges.txt, line 2: a merge is two tokens"),
        ("merges.txt", "d o\nx y\n", "cannot be put together"),
        ("merges.txt", b"\xff\xfe", "merges.txt cannot be read"),
        ("vocab.json", '{"a": "b"}', "'a' has the id 'b'"),
        ("vocab.json", "[1, 2]", "expected a JSON object, found a list"),
        ("vocab.json", '{"a": 1,', "vocab.json: not JSON"),
        ("vocab.json", "[" * 100_000, "vocab.json: not JSON"),
        ("tokenizer_config.json", b"\xff", "tokenizer_config.json: not JSON"),
    ],
)
def test_broken_files(tmp_path, name, content, message):
    byte_pairs(tmp_path, ["<|endoftext|>"])
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        load_processor(tmp_path)


def test_ids_with_a_gap_cannot_be_added_to(tmp_path):
    write(tmp_path, "vocab.json", {"a": 0, "<|endoftext|>": 2})
    (tmp_path / "merges.txt").write_text("")
    write(tmp_path, "tokenizer_config.json", {"pad_token": "<|pad|>"})
    with pytest.raises(InputError, match="id 2 would stand for"):
        load_processor(tmp_path)


# tokenizer.json.


def test_tokenizer_json_stands_for_the_vocabulary_files(bert, tmp_path):
    processor = bert(do_lower_case=False)
    processor.save(tmp_path / "saved")
    assert not (tmp_path / "saved/vocab.txt").exists()
    again = load_processor(tmp_path / "saved")
    assert again.tokenizer.habits == processor.tokenizer.habits
    for text in ("a dog", "A Dog [MASK]", "CAFÉ 犬"):
        assert again.tokenizer.encode_text(text) == processor.tokenizer.encode_text(text)


def test_tokenizer_json_of_no_known_class_stands_as_it_is(bert, tmp_path):
    bert(do_lower_case=False).save(tmp_path / "saved")
    content = json.loads((tmp_path / "saved/tokenizer.json").read_text())
    content["padding"] = {
        "strategy": {"Fixed": 30},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "[PAD]",
    }
    content["truncation"] = {
        "direction": "Left",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    write(tmp_path / "other", "tokenizer.json", content)
    write(tmp_path / "other", "tokenizer_config.json", {"tokenizer_class": "FooTokenizerFast"})
    processor = load_processor(tmp_path / "other")
    batch = processor(text=["Dog a dog a", "a"])
    # Lengths are the caller's, not those that the file was once used with.
    assert tokens(processor, batch["text"][0]) == ["[CLS]", "[UNK]", "a", "dog", "a", "[SEP]"]
    assert tokens(processor, batch["text"][1]) == ["[PAD]"] * 3 + ["[CLS]", "a", "[SEP]"]


def test_tokenizer_json_of_another_model(tmp_path):
    write(tmp_path, "tokenizer.json", {"model": {"type": "BPE", "vocab": {}, "merges": []}})
    write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "BertTokenizer"})
    with pytest.raises(InputError, match="expected a WordPiece model, found 'BPE'"):
        load_processor(tmp_path)
    write(tmp_path, "tokenizer.json", {"model": {"type": "WordPiece", "vocab": {"a": "b"}}})
    with pytest.raises(InputError, match="its vocabulary is broken"):
        load_processor(tmp_path)
    write(tmp_path, "tokenizer_config.json", {})
    with pytest.raises(InputError, match="cannot be put together"):
        load_processor(tmp_path)


def test_siglip2_reads_in_lower_case(tmp_path):
    """The fixed vocabulary of Gemma: spaces are pieces, unknown letters are bytes."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "a", "▁", "d", "▁a"]
    ids = numbered(pieces)
    end = {"<eos>": {"id": "<eos>", "ids": [1], "tokens": ["<eos>"]}}
    parts = [
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "<eos>", "type_id": 0}},
    ]
    template = {"type": "TemplateProcessing", "single": parts, "pair": parts, "special_tokens": end}
    model = {"type": "BPE", "vocab": ids, "merges": [["▁", "a"]]}
    write(tmp_path, "tokenizer.json", {"model": model, "post_processor": template})
    write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "GemmaTokenizer"})

    def read(text):
        return load_processor(tmp_path)(text=text)["text"][0].tolist()

    assert read("A aé") == [5 + 65, ids["▁a"], 5 + 0xC3, 5 + 0xA9, 1]
    write(tmp_path, "config.json", {"model_type": "siglip2"})
    lower = [ids["a"], ids["▁a"], 5 + 0xC3, 5 + 0xA9, 1]
    assert read("A aé") == [0] * 59 + lower  # on the left, unless the config says right
