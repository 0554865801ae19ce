"""Losses beside those that classes of `transformers` compute themselves, and their gradients."""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import mmjax
from mmjax.objectives import Features, Masking
from mmjax.objectives.contrastive import Contrastive, SigmoidContrastive
from mmjax.objectives.masked_codes import MaskedCodes, MaskedCodesAlone
from mmjax.objectives.masked_language import MaskedLanguage, MaskedLanguageAlone
from mmjax.objectives.matching import matching_loss
from tests.cases import CASES
from tests.cases.case import NAMES, pictures, renamed, texts
from tests.objectives.fakes import FakeTokenizer, batch_of
from tests.parity import torch_side

LOSSES = 1e-5
GRADIENTS = 1e-4  # relative, by norm, of every parameter
ROWS = 4


@dataclass
class Sides:
    """The same weights in both libraries."""

    theirs: torch.nn.Module
    model: mmjax.models.model.Model
    folder: Path

    def assert_same(self, loss, their_loss):
        """`loss(model)` and `their_loss`, and both by every parameter."""
        graph, state = nnx.split(self.model)
        differentiate = jax.jit(jax.value_and_grad(lambda params: loss(nnx.merge(graph, params))))
        with jax.default_matmul_precision("highest"):
            found, gradient = differentiate(nnx.to_pure_dict(state))
        np.testing.assert_allclose(found, their_loss.item(), rtol=LOSSES)

        # A gradient written as if it were weights comes back under their names.
        mmjax.save_huggingface(nnx.merge(graph, gradient), self.folder / "gradient")
        read = type(self.theirs).from_pretrained(self.folder / "gradient")
        ours = {name: value.detach() for name, value in read.named_parameters()}
        self.theirs.zero_grad()
        their_loss.backward()
        gradients = {n: p.grad for n, p in self.theirs.named_parameters() if p.grad is not None}
        largest = max(float(g.norm()) for g in gradients.values())
        assert largest > 1e-2
        for name, expected in gradients.items():
            norm = max(float(expected.norm()), 1e-2 * largest)
            assert float((ours[name] - expected).norm()) < GRADIENTS * norm, name


@pytest.fixture
def sides(request, tmp_path):
    """The class of a case, by the case's name."""
    case = next(case for case in CASES if case.name == request.param)
    theirs = torch_side.build(case)
    if case.name == "align":
        theirs.temperature.data.fill_(0.1)  # 1 makes little of a difference in similarity
    theirs.save_pretrained(tmp_path / "theirs")
    return Sides(theirs, mmjax.load(tmp_path / "theirs"), tmp_path)


def tensors(inputs):
    return {name: torch.tensor(array) for name, array in renamed(inputs).items()}


def pairs(seed=0):
    rng = np.random.default_rng(seed)
    # (of noise alone all means are the same, and a mean is all that ALIGN's tower has to tell)
    colour = 3 * rng.normal(size=(ROWS, 1, 1, 3)).astype(np.float32)
    return {"image": pictures(rng, ROWS) + colour, **texts(rng, ROWS)}


@pytest.mark.parametrize(
    ("sides", "objective"),
    [
        ("clip", Contrastive()),
        ("align", Contrastive(smoothing=0.1)),
        ("siglip", SigmoidContrastive()),
    ],
    indirect=["sides"],
)
def test_contrastive_losses(sides, objective):
    inputs = pairs()
    inputs["text"][np.arange(ROWS), [6, 3, 5, 2]] = 19  # where CLIP's texts end
    if isinstance(objective, SigmoidContrastive):
        inputs["text_mask"][:] = True  # SigLIP attends to padding
    expected = sides.theirs(**tensors(inputs), return_loss=True).loss

    def loss(model):
        loss = objective(Features(model, batch_of(ROWS, **inputs)), jax.random.key(0))
        return loss.total / loss.weight

    sides.assert_same(loss, expected)


# ---- FLAVA, whose class computes all its losses; ours draw what is hidden

TEXT, IMAGE = ("text", "text_mask", "input_ids_masked"), ("image",)
FLAVA = {
    "global_contrastive": (Contrastive(), TEXT + IMAGE),
    "mmm_text": (MaskedLanguage(), TEXT + IMAGE),
    "mmm_image": (MaskedCodes(), TEXT + IMAGE),
    "mlm": (MaskedLanguageAlone(), TEXT),
    "mim": (MaskedCodesAlone(), IMAGE),
}


def masked_features(model, seed=0):
    codes = np.random.default_rng(seed + 1).integers(0, 6, (ROWS, 4)).astype(np.int32)
    masking = Masking(words=0.4, patches=0.5, conditional=False)
    batch = batch_of(ROWS, **pairs(seed), image_codes=codes)
    return Features(model, batch, tokenizer=FakeTokenizer(), masking=masking)


def flava_answer(sides, inputs, truth):
    """Of the class, shown `inputs` with what our features hide of them."""
    features = masked_features(sides.model)
    batch, words, patches = features.batch, features.words_masked, features.patches_masked
    given = {
        **tensors({name: np.asarray(batch[name]) for name in ("image", "text", "text_mask")}),
        "input_ids_masked": words.text,
        "mlm_labels": jnp.where(words.chosen, batch["text"], -100),
        "bool_masked_pos": patches.chosen,
        "mim_labels": batch["image_codes"],
        "itm_labels": truth,
    }
    left_out = {"image", *TEXT} - set(inputs)
    for name in left_out:
        given.pop(NAMES.get(name, name))
    given = {
        name: x if isinstance(x, torch.Tensor) else torch.tensor(np.asarray(x)).long()
        for name, x in given.items()
    }
    return sides.theirs(**given, return_loss=True).loss_info


@pytest.mark.parametrize("sides", ["flava-pretraining"], indirect=True)
@pytest.mark.parametrize("name", FLAVA)
def test_flavas_losses(sides, name):
    objective, inputs = FLAVA[name]

    def mean(model):
        loss = objective(masked_features(model), jax.random.key(0))
        return loss.total / loss.weight

    sides.assert_same(mean, flava_answer(sides, inputs, np.ones(ROWS))[name])


@pytest.mark.parametrize("sides", ["flava-pretraining"], indirect=True)
def test_flava_matches_masked_pairs(sides):
    """Its matching head reads the pass in which words and patches are hidden."""
    truth = np.array([True, False, False, True])

    def mean(model):
        logits = model.match(masked_features(model).words_masked.fused)
        return matching_loss(logits, jnp.array(truth)).mean()

    sides.assert_same(mean, flava_answer(sides, TEXT + IMAGE, truth)["itm"])
