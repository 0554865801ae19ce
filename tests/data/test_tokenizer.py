import pickle
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mmjax.data.tokenizer import TextTokenizer
from mmjax.errors import InputError

TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "runs", "cafe"]
TOKENS += ["un", "##believ", "##able", ",", "[", "]", "mask"]


@pytest.fixture
def vocabulary(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(TOKENS) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def tokenizer(vocabulary):
    return TextTokenizer.from_vocabulary(vocabulary)


def captions(folder):
    rows = (folder / "data/flickr8k/Flickr8k.token.txt").read_text().splitlines()
    return [row.split("\t")[1] for row in rows]


def test_pads_and_masks(tokenizer):
    ids, mask = tokenizer.encode("A dog", 6)
    assert ids.dtype == np.int32
    assert mask.dtype == bool
    assert tokenizer.tokens(ids) == ["[CLS]", "a", "dog", "[SEP]", "[PAD]", "[PAD]"]
    assert mask.tolist() == [True, True, True, True, False, False]


def test_cuts_long_text_and_keeps_sep(tokenizer):
    ids, mask = tokenizer.encode("a dog runs , a dog runs", 4)
    assert tokenizer.tokens(ids) == ["[CLS]", "a", "dog", "[SEP]"]
    assert mask.all()
    assert tokenizer.tokens(tokenizer.encode("a dog", 4)[0])[-1] == "[SEP]"


def test_lower_cases_strips_accents_and_splits_pieces(tokenizer):
    ids, _ = tokenizer.encode("CAFÉ unbelievable zebra", 8)
    assert tokenizer.tokens(ids)[1:6] == ["cafe", "un", "##believ", "##able", "[UNK]"]


def test_special_tokens_in_a_text_are_text(tokenizer):
    ids, _ = tokenizer.encode("a [MASK] dog", 10)
    assert tokenizer.tokens(ids)[1:6] == ["a", "[", "mask", "]", "dog"]
    assert tokenizer.mask_id not in ids


def test_decode_joins_pieces(tokenizer):
    ids, _ = tokenizer.encode("Unbelievable dog", 8)
    assert tokenizer.decode(ids) == "unbelievable dog"
    assert tokenizer.decode([tokenizer.mask_id]) == "[MASK]"


def test_ids_are_line_numbers(tokenizer):
    assert tokenizer.vocabulary_size == len(TOKENS)
    assert tokenizer.special_ids == (0, 1, 2, 3, 4)
    assert (tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id) == (0, 2, 3, 4)


def test_unknown_id_is_refused(tokenizer):
    with pytest.raises(ValueError, match=f"id {len(TOKENS)} is outside"):
        tokenizer.tokens([len(TOKENS)])


def test_too_short_a_length_is_refused(tokenizer):
    with pytest.raises(ValueError, match="length = 1"):
        tokenizer.encode("a", 1)


def test_pairs_have_types(tokenizer):
    ids, mask, types = tokenizer.encode_pair("A dog", "unbelievable", 10)
    assert tokenizer.tokens(ids) == (
        ["[CLS]", "a", "dog", "[SEP]", "un", "##believ", "##able", "[SEP]", "[PAD]", "[PAD]"]
    )
    assert (ids.dtype, mask.dtype, types.dtype) == (np.int32, bool, np.int32)
    assert mask.tolist() == [True] * 8 + [False] * 2
    assert types.tolist() == [0] * 4 + [1] * 4 + [0] * 2


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("a dog runs a dog", "cafe", "a dog runs [SEP] cafe"),
        ("a", "dog runs cafe dog", "a [SEP] dog runs cafe"),
        ("a dog runs", "dog runs a", "a dog [SEP] dog runs"),
        ("", "", "[SEP]"),
    ],
)
def test_of_a_pair_the_longer_text_is_cut(tokenizer, first, second, expected):
    ids, mask, types = tokenizer.encode_pair(first, second, 7)
    assert tokenizer.tokens(ids[mask]) == ["[CLS]", *expected.split(), "[SEP]"]
    assert types[mask].sum() == len(expected.split("[SEP]")[1].split()) + 1


def test_too_short_a_length_of_a_pair_is_refused(tokenizer):
    with pytest.raises(ValueError, match="length = 2"):
        tokenizer.encode_pair("a", "dog", 2)


def test_the_end_token_may_be_left_out(tokenizer):
    open_end = tokenizer.with_end_token(False)
    assert (tokenizer.end_token, open_end.end_token) == (True, False)
    assert open_end.tokens(open_end.encode("a dog", 4)[0]) == ["[CLS]", "a", "dog", "[PAD]"]
    assert open_end.tokens(open_end.encode("a dog runs", 3)[0]) == ["[CLS]", "a", "dog"]
    ids, mask, types = open_end.encode_pair("a dog", "runs", 6)
    assert open_end.tokens(ids[mask]) == ["[CLS]", "a", "dog", "[SEP]", "runs"]
    assert types.tolist() == [0, 0, 0, 0, 1, 0]
    for end_token in (False, True):
        closed = tokenizer.encode("a dog", 5, end_token=end_token)
        np.testing.assert_array_equal(open_end.encode("a dog", 5, end_token=end_token), closed)
    again = TextTokenizer.from_json(open_end.to_json())
    assert not again.end_token
    assert again.with_end_token(True).to_json() == tokenizer.to_json()


def test_pieces_that_go_on_with_a_word_are_known(tokenizer):
    goes_on = [token.startswith("##") for token in TOKENS]
    assert tokenizer.continues.dtype == bool
    assert tokenizer.continues.tolist() == goes_on
    assert sum(goes_on) == 2
    assert tokenizer.continues is tokenizer.continues


def test_count_is_the_room_that_a_text_takes(tokenizer):
    prompt, caption = "a unbelievable", "dog runs"
    assert tokenizer.count("") == 0
    assert tokenizer.count(prompt) == 4
    whole = tokenizer.encode(f"{prompt} {caption}", 12)[0]
    assert tokenizer.tokens(whole[1 + tokenizer.count(prompt) :])[:2] == caption.split()


@pytest.mark.parametrize(
    "copy",
    [
        lambda tokenizer: TextTokenizer.from_json(tokenizer.to_json()),
        lambda tokenizer: pickle.loads(pickle.dumps(tokenizer)),
    ],
)
def test_survives_storage(tokenizer, copy):
    again = copy(tokenizer)
    text = "A café, unbelievable!"
    np.testing.assert_array_equal(again.encode(text, 9)[0], tokenizer.encode(text, 9)[0])
    assert again.to_json() == tokenizer.to_json()
    assert again.special_ids == tokenizer.special_ids


def test_missing_special_token_is_named(vocabulary):
    vocabulary.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n")
    with pytest.raises(InputError, match=r"vocab.txt.*no \[MASK\]"):
        TextTokenizer.from_vocabulary(vocabulary)


def test_doubled_token_is_named(vocabulary):
    vocabulary.write_text("\n".join([*TOKENS, "dog"]))
    with pytest.raises(InputError, match=rf"lines 7 and {len(TOKENS) + 1}: the token 'dog'"):
        TextTokenizer.from_vocabulary(vocabulary)


def test_absent_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none.txt: the vocabulary cannot be read: No such file"):
        TextTokenizer.from_vocabulary(tmp_path / "none.txt")


def test_binary_file_is_refused(vocabulary):
    vocabulary.write_bytes(b"[PAD]\n\xff\xfe\n")
    with pytest.raises(InputError, match="not UTF-8"):
        TextTokenizer.from_vocabulary(vocabulary)


@pytest.mark.parametrize("text", ["not json", '{"model": 3}'])
def test_broken_json_is_refused(text):
    with pytest.raises(InputError, match="cannot be read"):
        TextTokenizer.from_json(text)


def test_training_learns_frequent_words():
    tokenizer = TextTokenizer.train(["the red square", "The red ball"] * 5 + ["once"], 60)
    assert tokenizer.tokens(tokenizer.encode("the red ball square", 6)[0])[1:5] == [
        "the",
        "red",
        "ball",
        "square",
    ]
    assert tokenizer.special_ids == (0, 1, 2, 3, 4)
    # `once` was seen once only: its characters are known, the word is not.
    assert tokenizer.tokens(tokenizer.encode("once", 6)[0])[1:5] == ["o", "##n", "##c", "##e"]


def test_training_refuses_too_small_a_vocabulary():
    with pytest.raises(InputError, match=r"10 tokens is too small: the texts have 6 .* 17 tokens"):
        TextTokenizer.train(["abc def"], 10)


def test_training_is_deterministic_across_processes(shared):
    """The library alone numbers tokens in the order of a hash table seeded anew each time."""
    script = (
        "import sys; from mmjax.data.tokenizer import TextTokenizer;"
        "texts = [l.split('\\t')[1] for l in open(sys.argv[1])];"
        "print(TextTokenizer.train(texts, 500).to_json(), end='')"
    )
    path = str(shared / "data/flickr8k/Flickr8k.token.txt")
    elsewhere = subprocess.run(
        [sys.executable, "-c", script, path], capture_output=True, text=True, check=True
    ).stdout
    here = [TextTokenizer.train([f"{t}\n" for t in captions(shared)], 500).to_json() for _ in "ab"]
    assert here[0] == here[1] == elsewhere


def test_threads_agree_with_one_thread(shared):
    texts = captions(shared)[:400]
    tokenizer = TextTokenizer.train(texts, 300)
    lengths = [8 + i % 5 for i in range(len(texts))]
    alone = [tokenizer.encode(text, n)[0] for text, n in zip(texts, lengths, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda text, n: tokenizer.encode(text, n)[0], texts, lengths))
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_array_equal(a, b)


def greedy_wordpiece(word, ids):
    """Longest match first, as Devlin et al. and Wu et al. (2016) describe it."""
    pieces, start = [], 0
    while start < len(word):
        for end in range(len(word), start, -1):
            piece = ("##" if start else "") + word[start:end]
            if piece in ids:
                break
        else:
            return ["[UNK]"]
        pieces.append(piece)
        start = end
    return pieces


def test_agrees_with_plain_python_on_bert_vocabulary(shared):
    path = shared / "data/vocab/bert-base-uncased-vocab.txt"
    ids = {token: i for i, token in enumerate(path.read_text().splitlines())}
    tokenizer = TextTokenizer.from_vocabulary(path)
    for caption in captions(shared)[::5]:  # they are ASCII, so that this splits as BERT does
        words = re.findall(r"[a-z0-9]+|[^a-z0-9\s]", caption.lower())
        tokens = ["[CLS]", *(p for word in words for p in greedy_wordpiece(word, ids)), "[SEP]"]
        encoded, mask = tokenizer.encode(caption, 64)
        assert encoded[mask].tolist() == [ids[token] for token in tokens]
    assert tokenizer.vocabulary_size == 30522
    assert (tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id) == (0, 101, 102)
    assert tokenizer.mask_id == 103
