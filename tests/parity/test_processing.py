"""Processors beside those of `transformers`, made from the same folders."""

import random
import shutil

import numpy as np
import pytest
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.bridgetower.image_processing_pil_bridgetower import (
    BridgeTowerImageProcessorPil,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.efficientnet.image_processing_pil_efficientnet import (
    EfficientNetImageProcessorPil,
)
from transformers.models.flava.image_processing_pil_flava import FlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.tokenization_siglip2 import Siglip2Tokenizer
from transformers.models.vilt.image_processing_pil_vilt import ViltImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from mmjax.errors import InputError
from mmjax.processing import load_processor, save_processor
from tests.processing.folders import write, write_published
from tests.records import keep

# Pictures. A hundredth of a standard deviation would do for a model; but the arithmetic is the same
# here and there, so that anything beyond float noise is a mistake.

CLOSE = 1e-5

THEIRS = {
    "ViTImageProcessor": ViTImageProcessorPil,
    "DeiTImageProcessor": DeiTImageProcessorPil,
    "CLIPImageProcessor": CLIPImageProcessorPil,
    "SiglipImageProcessor": SiglipImageProcessorPil,
    "BlipImageProcessor": BlipImageProcessorPil,
    "ViltImageProcessor": ViltImageProcessorPil,
    "FlavaImageProcessor": FlavaImageProcessorPil,
    "BridgeTowerImageProcessor": BridgeTowerImageProcessorPil,
    "EfficientNetImageProcessor": EfficientNetImageProcessorPil,
    "ConvNextImageProcessor": ConvNextImageProcessorPil,
}

ALIGN = {
    "crop_size": {"height": 57, "width": 57},
    "do_center_crop": True,
    "do_normalize": False,
    "include_top": False,
    "rescale_factor": 1 / 127.5,
    "rescale_offset": True,
    "size": {"height": 69, "width": 69},
    "resample": 2,
}

CONFIGS = [
    *((name, {}) for name in THEIRS),  # the family's own values
    ("ViTImageProcessor", {"size": 33, "resample": 3, "image_mean": [0.4, 0.5, 0.6]}),
    ("ViTImageProcessor", {"do_resize": False, "do_center_crop": True, "crop_size": 21}),
    ("ViTImageProcessor", {"do_normalize": False, "size": {"height": 20, "width": 31}}),
    ("ViTImageProcessor", {"do_rescale": False, "size": [20, 31], "resample": 0}),
    ("ViTImageProcessor", {"image_mean": 0.3, "image_std": 0.2, "crop_pct": 0.5}),
    ("CLIPImageProcessor", {"size": 48, "crop_size": 40, "resample": 2}),
    ("CLIPImageProcessor", {"size": 40, "crop_size": {"height": 61, "width": 37}}),
    ("CLIPImageProcessor", {"size": {"shortest_edge": 40, "longest_edge": 55}, "crop_size": 44}),
    ("CLIPImageProcessor", {"do_resize": False, "crop_size": 64, "resample": 1}),
    ("CLIPImageProcessor", {"do_center_crop": None, "crop_size": None, "size": 64}),
    ("SiglipImageProcessor", {"size": {"height": 48, "width": 32}, "resample": 4}),
    ("SiglipImageProcessor", {"size": 30}),
    ("BlipImageProcessor", {"size": 40, "resample": 5, "rescale_factor": 0.01}),
    ("ViltImageProcessor", {"size": 64, "size_divisor": 16}),
    ("ViltImageProcessor", {"size": {"shortest_edge": 48}, "do_pad": False, "resample": 2}),
    ("BridgeTowerImageProcessor", {"size": {"shortest_edge": 96}}),
    ("BridgeTowerImageProcessor", {"size": {"shortest_edge": 96}, "do_center_crop": False}),
    ("EfficientNetImageProcessor", ALIGN),
    ("EfficientNetImageProcessor", {"size": 33, "rescale_offset": True, "do_center_crop": True}),
    ("ConvNextImageProcessor", {"size": 56, "crop_pct": 0.875}),  # ResNet's
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 64}, "crop_pct": 0.9, "resample": 2}),
    ("ConvNextImageProcessor", {"size": 385}),
]


def noise(height, width, seed=0):
    """A smooth picture with noise on it."""
    y, x = np.mgrid[:height, :width]
    waves = 128 + 90 * np.sin(np.stack([y / 7, x / 5, (x + y) / 11], axis=-1))
    rng = np.random.default_rng(seed)
    return (waves + rng.normal(0, 12, waves.shape)).clip(0, 255).astype(np.uint8)


def pictures():
    shapes = [(60, 80), (81, 47), (33, 33), (7, 9), (301, 200), (224, 224), (41, 130)]
    shapes += [(1, 1), (23, 1), (1, 19)]
    rgb = [Image.fromarray(noise(*shape, seed)) for seed, shape in enumerate(shapes)]
    alpha = np.concatenate([noise(50, 37), noise(50, 37, 1)[..., :1]], axis=-1)
    grey = Image.fromarray(noise(45, 66)[..., 0])
    return [*rgb, Image.fromarray(alpha), grey, rgb[0].quantize(16), noise(52, 61)]


def too_narrow(processor, picture):
    try:
        processor(image=picture)
    except InputError as error:
        return "too narrow" in str(error)
    return False


@pytest.mark.parametrize(("name", "config"), CONFIGS)
def test_pixels(tmp_path, name, config):
    # Unless told to convert, theirs leaves grey and RGBA as they are, and fails to normalise them.
    config = config | {"image_processor_type": name, "do_convert_rgb": True}
    write(tmp_path, "preprocessor_config.json", config)
    ours, theirs = load_processor(tmp_path), THEIRS[name].from_pretrained(tmp_path)
    most = 0.0
    for picture in pictures():
        if too_narrow(ours, picture):
            with pytest.raises(ValueError, match=r"height=0|width=0"):
                theirs(picture)
            continue
        batch = ours(image=picture)
        expected = theirs(picture, return_tensors="np")
        pixels = np.moveaxis(expected["pixel_values"], 1, -1)
        assert batch["image"].dtype == np.float32
        assert batch["image"].shape == pixels.shape
        most = max(most, np.abs(batch["image"] - pixels).max())
        if "image_mask" in batch:
            np.testing.assert_array_equal(batch["image_mask"], expected["pixel_mask"])
    assert most <= CLOSE
    family = name.removesuffix("ImageProcessor").lower()
    keep(f"{family}-pixels", against=THEIRS[name].__name__, outputs=float(most))


def test_pictures_of_a_batch_are_padded_together(tmp_path):
    write(tmp_path, "preprocessor_config.json", {"feature_extractor_type": "ViltFeatureExtractor"})
    several = [noise(60, 80), noise(81, 47), noise(301, 200)]
    ours = load_processor(tmp_path)(image=several)
    theirs = ViltImageProcessorPil.from_pretrained(tmp_path)(several, return_tensors="np")
    np.testing.assert_allclose(
        np.moveaxis(ours["image"], -1, 1), theirs["pixel_values"], atol=CLOSE
    )
    np.testing.assert_array_equal(ours["image_mask"], theirs["pixel_mask"])


# Texts.

ODD = [
    "a dog runs",
    "A Café, naïve  résumé!",
    "",
    "   ",
    "日本語のテキスト と 한국어 text",
    "emoji 👍🏽 👨‍👩‍👧 🇩🇪 ok",
    "control \x00\x01\x7f\u200b\u00ad\ufeff chars\r\n\ttabs",
    "a [MASK] dog [SEP] [PAD] x",
    "<mask> a <mask>b </s> <s><pad> <unk> </s>",
    "<|endoftext|> it's <|startoftext|>I'll don't we've",
    "unbelievableness antidisestablishmentarianism",
    "x" * 300,
    "word " * 700,
    "don't. can't! it's — “quoted” … 3.14 1,000 50%",
    "İstanbul ΟΔΟΣ ß ﬁ ① ½",
    "▁ under ▁▁score",
    "<extra_id_0> and <extra_id_99> ▁<extra_id_5>",
    "n\u0303 ñ ậ é̂ नमस्ते",
    "\u3000wide\u3000space\u00a0nb",
    " lead",
    "trail ",
    "\n",
    "New York and new york foobar <X> a  <mask> b",
]


def random_texts(number):
    """Texts of everything that normalisers treat specially."""
    rng = random.Random(1)
    pools = [
        "abc déf ",
        "  \t\n\u3000▁▁ ",
        "ﬁﬀ①②Å①é̂ä̈ạ̈",
        "日本語ｶﾞギ한국어각",
        "👍🏽👨‍👩‍👧😀🇩🇪",
        "<>[]!.,;_-~\"'",
        "\u200b\u00ad\ufeff\x00\x01\x7f\u0085",
        "ΑΣςİıßẞ",
        "नमस्ते हिन्दी กำ",
        "\u0300\u0301\u0345\u0958ậ",
        ["[MASK]", "<mask>", "</s>", "<s>", "<unk>", "<|endoftext|>", "[SEP]", "<pad>"],
    ]
    for _ in range(number):
        yield "".join(rng.choice(rng.choice(pools)) for _ in range(rng.randrange(20)))


TEXTS = [*ODD, *random_texts(300)]

CLASSES = {
    "bert": transformers.BertTokenizer,
    "clip": transformers.CLIPTokenizer,
    "roberta": transformers.RobertaTokenizer,
    "gpt2": transformers.GPT2Tokenizer,
    "t5": transformers.T5Tokenizer,
    "siglip": transformers.SiglipTokenizer,
    "gemma": transformers.GemmaTokenizer,
    "siglip2": Siglip2Tokenizer,
    "generic": transformers.PreTrainedTokenizerFast,
}


def class_of(name):
    if name in ("t5", "siglip"):
        pytest.importorskip("sentencepiece", reason="transformers reads spiece.model with it")
    return CLASSES[name]


@pytest.fixture(scope="session")
def vocabularies(shared, tmp_path_factory):
    """A folder for each class."""
    root = tmp_path_factory.mktemp("vocabularies")
    write_published(shared / "data/vocab", root)
    CLASSES["bert"].from_pretrained(root / "bert").save_pretrained(root / "generic")
    for name in ("gemma", "siglip2", "generic"):
        write(root / name, "tokenizer_config.json", {"tokenizer_class": CLASSES[name].__name__})
    for name in ("gemma", "siglip2"):
        byte_fallback().save(str(root / name / "tokenizer.json"))
    return root


def byte_fallback():
    """A small tokenizer of Gemma's kind."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{b:02X}>" for b in range(256))]
    trainer = BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", pair="$A <eos> $B <eos>", special_tokens=[("<eos>", 1)]
    )
    return tokenizer


def assert_agree(folder, theirs, tmp_path):
    """Ours, from the folder, and what is read here and there of what ours writes, do as theirs."""
    ours = load_processor(folder)
    save_processor(ours, tmp_path / "written")
    again = load_processor(tmp_path / "written")
    for text in TEXTS:
        expected = theirs(text)["input_ids"]
        assert ours.tokenizer.encode_text(text)[0] == expected, text
        assert again.tokenizer.encode_text(text)[0] == expected, text
    for role in ("pad", "bos", "eos", "unk", "cls", "sep", "mask"):
        expected = getattr(theirs, f"{role}_token_id")
        if role != "pad" or expected is not None:
            assert getattr(ours.tokenizer, f"{role}_id") == expected, role
    assert ours.tokenizer.vocabulary_size == len(theirs)
    assert again.tokenizer.habits == ours.tokenizer.habits
    assert_batches_agree(ours, theirs)
    assert_batches_agree(ours, type(theirs).from_pretrained(tmp_path / "written"))


def assert_batches_agree(ours, theirs):
    if theirs.pad_token is None:
        theirs.pad_token = theirs.eos_token
    first, second = TEXTS[:40], TEXTS[9:49]
    usual = ours.tokenizer.habits.fixed_length
    for length in (None, 4, 13):
        width = usual if length is None else length
        options = {"padding": "max_length" if width else True, "truncation": True}
        for pairs in (None, second):
            if pairs and isinstance(theirs, transformers.SiglipTokenizer):
                continue
            batch = ours(text=first, text_pair=pairs, length=length)
            expected = theirs(first, pairs, return_tensors="np", max_length=width, **options)
            names = {
                "input_ids": "text",
                "attention_mask": "text_mask",
                "token_type_ids": "text_type",
            }
            assert {names[name] for name in expected} == batch.keys()
            for name, array in expected.items():
                np.testing.assert_array_equal(batch[names[name]], array)
            ids = expected["input_ids"]
            decoded = [theirs.decode(row, skip_special_tokens=True) for row in ids]
            assert ours.decode(ids) == decoded


VARIANTS = [
    *((name, {}) for name in CLASSES if name != "generic"),
    ("generic", {"pad_token": "[PAD]", "cls_token": "[CLS]"}),
    ("bert", {"do_lower_case": False, "model_max_length": 9}),
    ("bert", {"strip_accents": False, "tokenize_chinese_chars": False}),
    ("bert", {"padding_side": "left", "truncation_side": "left", "model_max_length": 11}),
    ("bert", {"clean_up_tokenization_spaces": True, "model_input_names": ["input_ids"]}),
    ("bert", {"additional_special_tokens": ["New York", "<X>"], "unk_token": "[unused1]"}),
    ("clip", {"pad_token": "!", "model_max_length": 77}),
    ("clip", {"model_max_length": 20}),
    ("roberta", {"add_prefix_space": True, "model_max_length": 12}),
    ("roberta", {"mask_token": AddedToken("<mask>", lstrip=True, special=True)}),
    ("gpt2", {"pad_token": "<X>", "add_prefix_space": True}),
    ("gpt2", {"add_bos_token": True}),
    ("siglip", {"do_lower_case": False, "model_max_length": 16}),
    ("siglip", {"additional_special_tokens": ["<X>"], "model_input_names": ["input_ids"]}),
    ("gemma", {"padding_side": "right", "model_max_length": 64}),
]


@pytest.mark.filterwarnings("ignore:This sequence already has")
@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_tokens_of_vocabulary_files(vocabularies, tmp_path, name, options):
    folder = tmp_path / "folder"
    shutil.copytree(vocabularies / name, folder)
    tokenizer_class = class_of(name)
    if options.keys() & {"mask_token"}:  # only theirs writes such a token into a config
        tokenizer_class.from_pretrained(folder, **options).save_pretrained(folder)
    else:
        write(
            folder,
            "tokenizer_config.json",
            {"tokenizer_class": tokenizer_class.__name__, **options},
        )
    if name == "siglip2":
        write(folder, "config.json", {"model_type": "siglip2"})
    assert_agree(folder, tokenizer_class.from_pretrained(folder), tmp_path)


@pytest.mark.filterwarnings("ignore:This sequence already has")
@pytest.mark.parametrize("name", ["bert", "clip", "roberta", "gpt2", "t5", "siglip"])
def test_tokens_of_a_folder_that_transformers_wrote(vocabularies, tmp_path, name):
    tokenizer = class_of(name).from_pretrained(vocabularies / name, model_max_length=32)
    tokenizer.add_tokens(["New York", "foobar"])
    tokenizer.save_pretrained(tmp_path / "theirs")
    assert_agree(tmp_path / "theirs", CLASSES[name].from_pretrained(tmp_path / "theirs"), tmp_path)


def test_tokens_of_an_old_folder(vocabularies, tmp_path):
    """Before 2023 special and added tokens had files of their own."""
    folder = tmp_path / "folder"
    shutil.copytree(vocabularies / "roberta", folder)
    mask = {"content": "<mask>", "lstrip": True, "rstrip": False, "normalized": False}
    special = {"pad_token": "<pad>", "mask_token": mask, "additional_special_tokens": ["<X>"]}
    write(folder, "special_tokens_map.json", special)
    write(folder, "added_tokens.json", {"<X>": 50265, "foobar": 50266})
    assert_agree(folder, CLASSES["roberta"].from_pretrained(folder), tmp_path)


def test_tokens_through_auto_classes(vocabularies, tmp_path):
    """The class is found as `AutoTokenizer` finds it: by the file, else by the model."""
    for name, model_type in (("bert", "vilt"), ("roberta", "bridgetower"), ("clip", "clip")):
        folder = tmp_path / name
        shutil.copytree(vocabularies / name, folder)
        (folder / "tokenizer_config.json").unlink()
        write(folder, "config.json", {"model_type": model_type})
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        ours = load_processor(folder).tokenizer
        assert [ours.encode_text(t)[0] for t in ODD] == [theirs(t)["input_ids"] for t in ODD]


# Both at once.


def make_clip(vocabularies):
    tokenizer = CLASSES["clip"].from_pretrained(vocabularies / "clip", model_max_length=77)
    return transformers.CLIPProcessor(CLIPImageProcessorPil(), tokenizer)


def make_siglip(vocabularies):
    tokenizer = class_of("siglip").from_pretrained(vocabularies / "siglip", model_max_length=64)
    return transformers.SiglipProcessor(
        SiglipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer
    )


def make_align(vocabularies):
    tokenizer = CLASSES["bert"].from_pretrained(vocabularies / "bert", model_max_length=512)
    return transformers.AlignProcessor(EfficientNetImageProcessorPil(**ALIGN), tokenizer)


def make_blip(vocabularies):
    tokenizer = CLASSES["bert"].from_pretrained(vocabularies / "bert", model_max_length=512)
    return transformers.BlipProcessor(
        BlipImageProcessorPil(size={"height": 48, "width": 48}), tokenizer
    )


def make_vilt(vocabularies):
    tokenizer = CLASSES["bert"].from_pretrained(vocabularies / "bert", model_max_length=40)
    return transformers.ViltProcessor(ViltImageProcessorPil(size={"shortest_edge": 64}), tokenizer)


def make_bridgetower(vocabularies):
    tokenizer = CLASSES["roberta"].from_pretrained(vocabularies / "roberta", model_max_length=514)
    return transformers.BridgeTowerProcessor(BridgeTowerImageProcessorPil(), tokenizer)


def make_flava(vocabularies):
    tokenizer = CLASSES["bert"].from_pretrained(vocabularies / "bert", model_max_length=512)
    return transformers.FlavaProcessor(FlavaImageProcessorPil(), tokenizer)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (make_clip, {"padding": "max_length", "truncation": True}),
        (make_siglip, {"padding": "max_length", "truncation": True}),
        (make_align, {"truncation": True}),  # it pads to 64 unasked
        (make_blip, {"padding": True, "truncation": True}),
        (make_vilt, {"padding": True, "truncation": True}),
        (make_bridgetower, {"padding": True, "truncation": True}),
        (make_flava, {"padding": True, "truncation": True}),
    ],
)
def test_whole_processors(vocabularies, tmp_path, make, options):
    """A folder as `transformers` 5 writes it, and as it reads what ours writes."""
    theirs = make(vocabularies)
    theirs.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "theirs/processor_config.json").is_file()
    ours = load_processor(tmp_path / "theirs")
    save_processor(ours, tmp_path / "ours")
    images, texts = [Image.fromarray(noise(60, 80)), Image.fromarray(noise(81, 47))], ODD[:6]
    batch = ours(image=images, text=texts)
    for processor in (theirs, type(theirs).from_pretrained(tmp_path / "ours")):
        expected = processor(images=images, text=texts, return_tensors="np", **options)
        np.testing.assert_allclose(
            np.moveaxis(batch["image"], -1, 1), expected["pixel_values"], atol=CLOSE
        )
        np.testing.assert_array_equal(batch["text"], expected["input_ids"])
        np.testing.assert_array_equal(batch["text_mask"], expected["attention_mask"])
        assert ("text_type" in batch) == ("token_type_ids" in expected)
    again = load_processor(tmp_path / "ours")(image=images, text=texts)
    assert again.keys() == batch.keys()
    for name, array in again.items():
        np.testing.assert_array_equal(array, batch[name])
