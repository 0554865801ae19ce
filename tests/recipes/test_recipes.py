"""Every recipe runs at its tiny size, and learns one batch by heart."""

import re

import pytest

from tests.recipes.baselines import BASELINES
from tests.recipes.fitting import ROOT, fit, recipes, tiny

# These stand for all in the everyday suite: two towers, two streams, one stream with regions, and a
# momentum model with a decoder.
EVERYDAY = (
    "pretrain/siglip_b16",
    "pretrain/coattention_b16",
    "pretrain/uniter_base",
    "pretrain/blip_b16",
)
ENOUGH = 0.6  # of what a predictor reaches that does not look


def _marked(recipe):
    return recipe if recipe in EVERYDAY else pytest.param(recipe, marks=pytest.mark.slow)


@pytest.mark.parametrize("recipe", [_marked(recipe) for recipe in recipes()])
def test_learns_one_batch_by_heart(recipe, tmp_path):
    config = tiny(recipe)
    assert not config.init_from
    losses, batch = fit(config, tmp_path)
    trained = [name for name, options in config.objectives.items() if options.weight > 0]
    assert trained
    for name in trained:
        found, blind = losses[f"{name}/loss"], BASELINES[name](batch)
        assert found < ENOUGH * blind, f"{name}: {found:.3f}, blind {blind:.3f}"


@pytest.mark.parametrize("recipe", recipes())
def test_says_where_its_values_come_from(recipe):
    header = (ROOT / "configs" / f"{recipe}.py").read_text().split('"""')[1]
    assert len(header.splitlines()) > 3
    if recipe.startswith("pretrain/") and not recipe.split("/")[1].startswith(("four", "flickr")):
        assert re.search(r"\b(19|20)\d\d\b", header), "no paper is named"
