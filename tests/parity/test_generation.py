"""Generated tokens beside those of `transformers`: the same, one by one."""

import numpy as np
import pytest
import torch

import mmjax
from tests.cases import gpt2
from tests.cases.case import LAYERS, UNCOMMON_LAYERS, Case, pictures
from tests.parity import torch_side

pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default:UserWarning")

BATCH, WORDS = 3, 12
DECODERS = [
    {**decoder, "vocab_size": WORDS, "n_positions": 24, "n_embd": 24}
    for decoder in (gpt2.DECODER, gpt2.UNCOMMON_DECODER)
]
TOKENS = {"eos_token_id": 3, "pad_token_id": 0, "bos_token_id": 2, "decoder_start_token_id": 1}

# What is generated hangs on all that an option does: how long, from what, when it is over.
OPTIONS = {
    "greedy": {"max_length": 12},
    "greedy-default": {},
    "greedy-least": {"min_length": 9, "max_length": 12},
    "greedy-penalty": {"repetition_penalty": 1.7, "max_new_tokens": 7},
    "greedy-ends": {"eos_token_id": [3, 7, 11], "pad_token_id": 5, "max_length": 10},
    "greedy-endless": {"eos_token_id": None, "max_new_tokens": 5},
    "beams": {"num_beams": 3, "max_length": 12},
    "beams-early": {"num_beams": 4, "early_stopping": True, "length_penalty": 0.5},
    "beams-never": {"num_beams": 2, "early_stopping": "never", "length_penalty": 2.0},
    "beams-short": {"num_beams": 3, "early_stopping": "never", "length_penalty": -1.0},
    "beams-least": {"num_beams": 3, "min_length": 9, "repetition_penalty": 1.3, "pad_token_id": 5},
    "beams-ends": {"num_beams": 2, "eos_token_id": [3, 7, 11], "max_length": 9},
    "beams-endless": {"num_beams": 3, "eos_token_id": None, "max_new_tokens": 4},
}


def built(case, seed, folder, **generation):
    """The model there and, from what it saves, here."""
    theirs = torch_side.build(case, seed)
    decoder = getattr(theirs, "decoder", theirs).transformer
    with torch.no_grad():
        # As it is, a model repeats one word: every word's vector is the likeliest to follow it.
        for weight in (w for w in decoder.h.parameters() if w.ndim > 1):
            weight *= 4
        decoder.wpe.weight *= 2
        decoder.wte.weight /= decoder.wte.weight.norm(dim=1, keepdim=True)
    theirs.generation_config.update(**TOKENS, **generation)
    theirs.save_pretrained(folder)
    return theirs, mmjax.load(folder)


def expected_of(model, options, **inputs):
    arguments = {"return_dict_in_generate": True, "output_scores": True, **options}
    return model.generate(**{k: torch.tensor(v) for k, v in inputs.items()}, **arguments)


def assert_same(found, expected):
    np.testing.assert_array_equal(found.tokens, expected.sequences.numpy())
    if "sequences_scores" in expected:
        np.testing.assert_allclose(found.scores, expected.sequences_scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPTIONS)
def test_continued_texts(name, tmp_path):
    """Every other time with prompts of several lengths."""
    config = DECODERS[len(name) % 2]
    case = Case("gpt2", "GPT2LMHeadModel", lambda t: t.GPT2Config(**config), dict)
    for seed in range(4):
        theirs, ours = built(case, seed, tmp_path)
        rng = np.random.default_rng(seed)
        mask = np.arange(4) >= seed % 2 * np.arange(BATCH)[:, None]
        text = np.where(mask, rng.integers(1, WORDS, size=mask.shape), 0)
        theirs_mask = mask.astype(np.int64)
        expected = expected_of(theirs, OPTIONS[name], input_ids=text, attention_mask=theirs_mask)
        assert_same(ours.generate(text, mask, **OPTIONS[name]), expected)


@pytest.mark.parametrize("begun", [False, True], ids=["", "begun"])
@pytest.mark.parametrize("name", ["greedy", "greedy-penalty", "beams", "beams-ends", "beams-least"])
def test_captions(name, begun, tmp_path):
    """Also as a model exported from here generates there."""
    image, decoder = ((LAYERS, UNCOMMON_LAYERS)[begun], DECODERS[begun])
    case = Case(
        name="captioner",
        kind="VisionEncoderDecoderModel",
        config=lambda t: t.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
            t.ViTConfig(**image, **gpt2.IMAGE), t.GPT2Config(**decoder)
        ),
        inputs=dict,
    )
    for seed in range(2):
        theirs, ours = built(case, seed, tmp_path / "theirs")
        rng = np.random.default_rng(seed)
        image_batch = pictures(rng, batch=BATCH)
        start = {"decoder_input_ids": rng.integers(2, WORDS, (BATCH, 3))} if begun else {}
        pixels = image_batch.transpose(0, 3, 1, 2)
        expected = expected_of(theirs, OPTIONS[name], pixel_values=pixels, **start)
        found = ours.generate(image_batch, start.get("decoder_input_ids"), **OPTIONS[name])
        assert_same(found, expected)
    mmjax.save_huggingface(ours, tmp_path / "ours")
    again = torch_side.load(case, tmp_path / "ours")
    assert_same(found, expected_of(again, OPTIONS[name], pixel_values=pixels, **start))


def test_a_model_generates_as_its_file_says(tmp_path):
    case = Case("gpt2", "GPT2LMHeadModel", lambda t: t.GPT2Config(**DECODERS[1]), dict)
    defaults = {"num_beams": 3, "max_new_tokens": 6, "length_penalty": 0.0, "min_length": 6}
    theirs, ours = built(case, 1, tmp_path / "theirs", **defaults)
    text = np.random.default_rng(0).integers(1, WORDS, size=(BATCH, 4))
    expected = expected_of(theirs, {}, input_ids=text)
    assert_same(ours.generate(text), expected)
    assert not np.array_equal(ours.generate(text, num_beams=1).tokens, expected.sequences)
    mmjax.save_huggingface(ours, tmp_path / "ours")
    assert_same(
        ours.generate(text),
        expected_of(torch_side.load(case, tmp_path / "ours"), {}, input_ids=text),
    )
