import json

import numpy as np
import pytest

import mmjax
from mmjax.errors import InputError
from mmjax.processing import load_processor, save_processor
from mmjax.processing.families import FAMILIES
from tests.data.test_image import gradient
from tests.processing.folders import write

BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog"]


@pytest.fixture
def folder(tmp_path):
    """ViLT's, as far as a processor is concerned."""
    path = tmp_path / "model"
    write(
        path, "preprocessor_config.json", {"image_processor_type": "ViltImageProcessor", "size": 64}
    )
    write(path, "tokenizer_config.json", {"tokenizer_class": "BertTokenizer"})
    (path / "vocab.txt").write_text("\n".join(BERT))
    return path


def test_pictures_and_texts_make_a_batch(folder):
    processor = mmjax.load_processor(folder)
    batch = processor(image=[gradient(64, 96), gradient(64, 64)], text=["a dog", "dog", "a"])
    assert {name: array.shape for name, array in batch.items()} == {
        "image": (2, 64, 96, 3),
        "image_mask": (2, 64, 96),
        "text": (3, 4),
        "text_mask": (3, 4),
        "text_type": (3, 4),
    }


def test_single_ones_are_batches_of_one(folder):
    processor = load_processor(folder)
    picture = gradient(64, 64)
    one = processor(image=picture, text="a", text_pair="dog")
    several = processor(image=[picture], text=["a"], text_pair=["dog"])
    stacked = processor(image=picture[None])
    for name, array in several.items():
        np.testing.assert_array_equal(one[name], array)
    np.testing.assert_array_equal(stacked["image"], several["image"])


def test_a_folder_may_have_one_of_the_two(folder):
    (folder / "vocab.txt").unlink()
    processor = load_processor(folder)
    assert processor.tokenizer is None
    with pytest.raises(InputError, match="no tokenizer"):
        processor(text="a")
    with pytest.raises(InputError, match="no tokenizer"):
        processor.decode([1])
    (folder / "preprocessor_config.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(BERT))
    processor = load_processor(folder)
    assert processor.pixels is None
    with pytest.raises(InputError, match="no image config"):
        processor(image=gradient(3, 3))
    (folder / "vocab.txt").unlink()
    with pytest.raises(InputError, match=r"neither an image config.*nor a tokenizer"):
        load_processor(folder)


def test_what_is_no_call(folder):
    processor = load_processor(folder)
    with pytest.raises(InputError, match=r"image=….*text=…"):
        processor()
    with pytest.raises(InputError, match="the first, text, is missing"):
        processor(image=gradient(64, 64), text_pair=["a"])
    with pytest.raises(InputError, match="list of pictures, found int"):
        processor(image=3)


def test_what_is_no_folder(folder):
    for path in (folder / "nowhere", folder / "vocab.txt"):
        with pytest.raises(InputError, match=path.name):
            load_processor(path)
    with pytest.raises(InputError, match="owner/name"):
        load_processor("hf://../secrets")


def test_nested_configs_come_first(folder):
    nested = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}}
    write(folder, "processor_config.json", {"processor_class": "Foo", "image_processor": nested})
    pixels = load_processor(folder).pixels
    assert pixels.image_processor_type == "CLIPImageProcessor"
    assert pixels.size == {"shortest_edge": 32}
    write(folder, "processor_config.json", {"processor_class": "Foo"})
    assert load_processor(folder).pixels.image_processor_type == "ViltImageProcessor"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "swin"}, "ViTImageProcessor"),
        ({"model_type": "resnet"}, "ConvNextImageProcessor"),
        ({"model_type": "align"}, "EfficientNetImageProcessor"),
        (
            {"model_type": "vision-text-dual-encoder", "vision_config": {"model_type": "clip"}},
            "CLIPImageProcessor",
        ),
        (
            {"model_type": "vision-encoder-decoder", "encoder": {"model_type": "vit"}},
            "ViTImageProcessor",
        ),
    ],
)
def test_the_model_tells_the_image_processor(folder, config, expected):
    write(folder, "preprocessor_config.json", {})
    with pytest.raises(InputError, match="names no image_processor_type"):
        load_processor(folder)
    write(folder, "config.json", config)
    assert load_processor(folder).pixels == FAMILIES[expected.removesuffix("ImageProcessor")]


@pytest.mark.parametrize(
    "where", ["preprocessor_config.json", "tokenizer_config.json", "config.json"]
)
def test_align_and_blip_have_habits_of_their_own(folder, where):
    def habits(family, processor_class):
        config = json.loads((folder / where).read_text()) if where != "config.json" else {}
        write(folder, where, config | {"processor_class": processor_class, "model_type": family})
        processor = load_processor(folder)
        processor.save(folder / "saved")
        again = load_processor(folder / "saved")
        assert again.tokenizer.habits == processor.tokenizer.habits
        return processor.tokenizer.habits

    assert habits("align", "AlignProcessor").fixed_length == 64
    assert habits("blip", "BlipProcessor").inputs == ("input_ids", "attention_mask")


def test_processors_come_back(folder):
    processor = load_processor(folder)
    save_processor(processor, folder / "deep/saved")
    again = load_processor(folder / "deep/saved")
    assert again.pixels == processor.pixels
    inputs = {"image": gradient(50, 70), "text": ["a dog", "dog [MASK]"]}
    expected = processor(**inputs)
    for name, array in again(**inputs).items():
        np.testing.assert_array_equal(array, expected[name])


def test_saving_where_it_would_be_hidden(folder):
    processor = load_processor(folder)
    write(folder, "processor_config.json", {})
    with pytest.raises(InputError, match=r"processor_config\.json"):
        processor.save(folder)
    with pytest.raises(InputError, match="no folder to write to"):
        processor.save(folder / "vocab.txt")


def test_nothing_is_executed_and_no_path_is_followed(folder, tmp_path):
    (folder / "code.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    (tmp_path / "secret.txt").write_text("\n".join([*BERT, "secret"]))
    automatic = {
        "AutoTokenizer": "code.T",
        "AutoImageProcessor": "code.P",
        "AutoProcessor": "code.Q",
    }
    for name in ("tokenizer_config.json", "preprocessor_config.json"):
        config = json.loads((folder / name).read_text()) | {"auto_map": automatic}
        write(folder, name, config | {"vocab_file": "../secret.txt", "trust_remote_code": True})
    processor = load_processor(folder)
    assert processor.tokenizer.id_of("secret") is None
    processor.save(tmp_path / "saved")
    assert "auto_map" not in (tmp_path / "saved/tokenizer_config.json").read_text()
    assert not (tmp_path / "executed").exists()
