"""Published vocabularies; the ids are recorded from transformers 5.23."""

import pytest

from mmjax.processing import load_processor
from tests.processing.folders import write_published

RECORDED_TEXTS = [
    "Two dogs, a café & 日本 👍!",
    "it's [MASK] <mask> <|endoftext|> </s> unbelievableness",
    "",
]
RECORDED = {
    "bert": [
        [101, 2048, 6077, 1010, 1037, 7668, 1004, 1864, 1876, 100, 999, 102],
        [
            101,
            2009,
            1005,
            1055,
            103,
            1026,
            7308,
            1028,
            1026,
            1064,
            2203,
            15794,
            10288,
            2102,
            1064,
            1028,
            1026,
            1013,
            1055,
            1028,
            23653,
            2791,
            102,
        ],
        [101, 102],
    ],
    "clip": [
        [49406, 1237, 3255, 267, 320, 15304, 261, 39121, 19277, 361, 4686, 256, 49407],
        [
            49406,
            585,
            568,
            314,
            8306,
            316,
            283,
            8306,
            285,
            49407,
            34308,
            338,
            285,
            11383,
            596,
            36551,
            49407,
        ],
        [49406, 49407],
    ],
    "roberta": [
        [0, 9058, 3678, 6, 10, 26059, 359, 47416, 6800, 8210, 44636, 11582, 26964, 8384, 328, 2],
        [
            0,
            405,
            18,
            646,
            32804,
            530,
            742,
            1437,
            50264,
            28696,
            15483,
            1397,
            1116,
            29015,
            15483,
            15698,
            1437,
            2,
            49856,
            23200,
            14186,
            2,
        ],
        [0, 2],
    ],
    "gpt2": [
        [9054, 3674, 2, 6, 26055, 355, 47412, 6796, 8206, 44632, 11578, 26960, 8380, 324],
        [
            401,
            14,
            642,
            32800,
            526,
            738,
            28692,
            43772,
            15694,
            1433,
            50259,
            49699,
            25,
            15694,
            49852,
            23196,
            14182,
        ],
        [],
    ],
    "t5": [
        [2760, 3888, 7, 4, 10, 11950, 4, 185, 4, 2, 4, 2, 56, 1],
        [
            35,
            32,
            8,
            785,
            23011,
            440,
            909,
            4,
            2,
            2755,
            158,
            3156,
            4,
            2,
            9176,
            990,
            859,
            6328,
            9176,
            3156,
            1,
            25526,
            656,
            1,
        ],
        [1],
    ],
    "siglip": [
        [193, 3888, 4, 10, 11950, 4, 3, 4, 3, 1],
        [166, 8182, 8182, 415, 859, 6328, 1, 203, 31734, 656, 1],
        [1],
    ],
}


@pytest.fixture(scope="module")
def published(shared, tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    write_published(shared / "data/vocab", root)
    return root


@pytest.mark.parametrize("name", RECORDED)
def test_published_vocabularies(published, tmp_path, name):
    processor = load_processor(published / name)
    processor.save(tmp_path)
    again = load_processor(tmp_path)
    for text, expected in zip(RECORDED_TEXTS, RECORDED[name], strict=True):
        assert processor.tokenizer.encode_text(text)[0] == expected
        assert again.tokenizer.encode_text(text)[0] == expected
