"""Every recipe runs at its tiny size, and learns one batch by heart."""

import re

import pytest

from mmjax.data.tokenizer import SPECIAL_TOKENS
from tests.recipes.baselines import BASELINES
from tests.recipes.fitting import ROOT, fit, recipes, tiny

# These stand for all in the everyday suite: two towers, one stream with regions, an answerer.
EVERYDAY = (
    "pretrain/siglip_b16",
    "pretrain/textbook_two_tower",
    "pretrain/textbook_vqa",
    "pretrain/uniter_base",
)
ENOUGH = 0.6  # of what a predictor reaches that does not look


def _marked(recipe):
    return recipe if recipe in EVERYDAY else pytest.param(recipe, marks=pytest.mark.slow)


@pytest.mark.parametrize("recipe", [_marked(recipe) for recipe in recipes()])
def test_learns_one_batch_by_heart(recipe, tmp_path):
    config = tiny(recipe)
    assert not config.init_from
    trained = [name for name, options in config.objectives.items() if options.weight > 0]
    assert trained

    def unlearned(losses, batch):
        """What is not well below a predictor that does not look: {objective: (found, blind)}."""
        # (a loss of pairs may hold the distance of words and regions, too)
        found = {
            name: losses.get(f"{name}/cross_entropy", losses[f"{name}/loss"]) for name in trained
        }
        blind = {name: BASELINES[name](batch) for name in trained}
        return {n: (found[n], blind[n]) for n in trained if not found[n] < ENOUGH * blind[n]}

    assert not unlearned(*fit(config, tmp_path, lambda *now: not unlearned(*now)))


@pytest.mark.parametrize("recipe", recipes())
def test_says_where_its_values_come_from(recipe):
    header = (ROOT / "configs" / f"{recipe}.py").read_text().split('"""')[1]
    assert len(header.splitlines()) > 2
    if recipe.startswith("pretrain/") and not recipe.split("/")[1].startswith(("four", "flickr")):
        assert re.search(r"\b(19|20)\d\d\b", header), "no paper is named"


@pytest.mark.parametrize("recipe", recipes())
def test_texts_begin_and_end_as_in_the_vocabulary_that_is_trained(recipe):
    """A model that writes would else begin with a word that there is not, and never end."""
    generation = tiny(recipe).model.get("generation")
    if generation is not None:
        begins = generation.decoder_start_token_id or generation.bos_token_id
        words = [SPECIAL_TOKENS[i] for i in (begins, *generation.eos_token_id)]
        assert words == ["[CLS]", "[SEP]"]
        assert SPECIAL_TOKENS[generation.pad_token_id] == "[PAD]"
