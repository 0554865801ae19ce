"""How a run starts: what is filled in, and what is taken from another run."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from mmjax.config import model_config, model_section, train_config
from mmjax.data import load_source
from mmjax.data.tokenizer import TextTokenizer
from mmjax.models import build_model
from mmjax.sharding import make_mesh
from mmjax.training.checkpoints import Checkpointer
from mmjax.training.start import resolve, start_state
from mmjax.training.state import StateConfig

TEXT = {"width": 16, "depth": 1, "heads": 2, "vocabulary_size": 20, "max_length": 8}
HEADS = {
    "one layer": ("visualbert", {}, ["answering"]),
    "two layers": ("uniter", {}, ["answering", "classifier"]),
}


def model_of(kind, **changes):
    return model_config(model_section(kind, text=TEXT, region_width=6, **changes).to_dict())


@pytest.mark.parametrize("case", HEADS)
@pytest.mark.parametrize("same", [True, False])
def test_columns_of_another_list_of_answers_are_not_taken(tmp_path, case, same):
    kind, changes, last_layer = HEADS[case]
    before = model_of(kind, answers=("no", "yes"), **changes)
    params = nnx.to_pure_dict(nnx.state(build_model(before, nnx.Rngs(7))))
    config = train_config()
    assets = {"config": {"model": {"answers": before.answers}}, "tokenizer": ""}
    with Checkpointer(tmp_path / "before", every=0, keep=1) as checkpointer:
        checkpointer.save(0, {"step": np.asarray(0), "params": params}, assets, force=True)
    config.init_from = str(tmp_path / "before")
    after = model_of(kind, answers=before.answers if same else ("yes", "no"), **changes)
    mesh = make_mesh()
    with jax.set_mesh(mesh), Checkpointer(tmp_path / "run", every=0, keep=1) as checkpointer:
        state = start_state(config, StateConfig(after, optax.sgd(0.1)), mesh, checkpointer)
    given, found = params, state.params
    for name in last_layer:
        given, found = given[name], found[name]
    assert np.array_equal(found["kernel"], given["kernel"]) == same
    blocks = [tree["fusion"]["blocks"] for tree in (state.params, params)]
    jax.tree.map(np.testing.assert_array_equal, *blocks)


@pytest.mark.parametrize(("kind", "filled"), [("vision_language", True), ("albef", False)])
def test_answers_are_filled_in_where_the_model_has_a_list(kind, filled):
    """Elsewhere the objective says what is missing."""
    config = train_config()
    config.data.update(task="questions", size=8, image_size=64)
    config.model = model_section(kind)
    config.objectives.answering.weight = 1.0
    source = load_source(config.data.to_dict())
    tokenizer = TextTokenizer.train(source.texts(), 100)
    model = resolve(config, tokenizer, source).model
    assert bool(model.get("answers")) == filled
    assert model.text.vocabulary_size == tokenizer.vocabulary_size
