"""Captions and answers beside those of `transformers`: the same tokens, one by one."""

import numpy as np
import pytest
import torch

import mmjax
from mmjax.errors import InputError
from tests.cases import blip
from tests.parity import torch_side

CASES = {case.name: case for case in blip.CASES}
OPTIONS = {
    "greedy": {"max_length": 11},
    "greedy-penalty": {"repetition_penalty": 1.7, "min_length": 5, "max_length": 9},
    "beams": {"num_beams": 3, "max_length": 10},
    "beams-early": {"num_beams": 4, "early_stopping": True, "length_penalty": 0.5, "max_length": 8},
}
CLS, SEP = 3, 19


@pytest.fixture(params=["", "-uncommon"], ids=["", "uncommon"])
def models(request, tmp_path):
    """(task) -> the class there, and what is loaded here of what it saves."""

    def build(task, seed):
        case = CASES[f"blip-{task}{request.param}"]
        theirs = torch_side.build(case, seed)
        theirs.save_pretrained(tmp_path)
        rng = np.random.default_rng(seed)
        return theirs, mmjax.load(tmp_path), case.inputs(rng)["image"], rng

    return build


def expected_of(model, image, options, **texts):
    arguments = {name: torch.tensor(array) for name, array in texts.items()}
    pixels = torch.tensor(image.transpose(0, 3, 1, 2))
    return model.generate(pixel_values=pixels, **arguments, **options).numpy()


@pytest.mark.parametrize("begun", [False, True], ids=["", "begun"])
@pytest.mark.parametrize("name", OPTIONS)
def test_captions(models, name, begun):
    for seed in range(2):
        theirs, ours, image, rng = models("captioning", seed)
        text = rng.integers(4, 18, size=(len(image), 4))
        text[:, 0], text[:, -1] = CLS, SEP
        texts = {"input_ids": text} if begun else {}
        expected = expected_of(theirs, image, OPTIONS[name], **texts)
        found = ours.generate(image, text if begun else None, **OPTIONS[name])
        np.testing.assert_array_equal(found.tokens, expected)


def test_captions_begun_at_several_lengths(models):
    """Every one is continued as it would be alone; `transformers` cannot continue them together."""
    theirs, ours, image, rng = models("captioning", 0)
    text = rng.integers(4, 18, size=(len(image), 6))
    text[:, 0] = CLS
    lengths = 3 + np.arange(len(image))
    mask = np.arange(6) < lengths[:, None]
    text = np.where(np.arange(6) == lengths[:, None] - 1, SEP, np.where(mask, text, 0))
    options = {"max_new_tokens": 4, "num_beams": 3}
    found = np.asarray(ours.generate(image, text, mask, **options).tokens)
    for i, length in enumerate(lengths):
        alone = expected_of(theirs, image[i : i + 1], options, input_ids=text[i : i + 1, :length])[
            0
        ]
        begins = lengths.max() - length
        np.testing.assert_array_equal(found[i, begins:][: len(alone)], alone)
        assert not found[i, begins + len(alone) :].any()


@pytest.mark.parametrize("name", OPTIONS)
def test_answers(models, name):
    for seed in range(2):
        theirs, ours, image, rng = models("answering", seed)
        text = rng.integers(4, 18, size=(len(image), 6))
        mask = np.arange(6) < 6 - np.arange(len(image))[:, None]
        questions = {"input_ids": text, "attention_mask": mask.astype(np.int64)}
        expected = expected_of(theirs, image, OPTIONS[name], **questions)
        found = ours.generate(image, text, mask, **OPTIONS[name])
        np.testing.assert_array_equal(found.tokens, expected)


def test_what_cannot_be_generated_is_refused(models):
    _, captioning, image, _ = models("captioning", 0)
    with pytest.raises(InputError, match=r"from \[CLS\] to \[SEP\]"):
        captioning.generate(image, np.full((len(image), 1), CLS))
    _, answering, image, _ = models("answering", 0)
    with pytest.raises(InputError, match="give the question"):
        answering.generate(image)
    with pytest.raises(InputError, match=r"no option .beams.\..*num_beams"):
        captioning.generate(image, beams=3)
