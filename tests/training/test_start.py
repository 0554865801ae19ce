"""How a run starts: what is filled in, and what is taken from another run."""

from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import mmjax
from mmjax import schema
from mmjax.config import model_config, model_section, train_config
from mmjax.data import load_source
from mmjax.data.tokenizer import SPECIAL_TOKENS, TextTokenizer
from mmjax.errors import InputError
from mmjax.models import ViTConfig, build_model
from mmjax.models.encoders import ImageModel, ImageModelConfig
from mmjax.sharding import make_mesh
from mmjax.training.checkpoints import Checkpointer, load_parameters
from mmjax.training.start import resolve, start_state
from mmjax.training.state import StateConfig
from mmjax.weights import save_checkpoint
from tests.models.reference import assert_same
from tests.runs import begin

BERT = Path(__file__).parents[1] / "goldens" / "bert"
TEXT = {"width": 16, "depth": 1, "heads": 2, "vocabulary_size": 20, "max_length": 8}
HEADS = {
    "one layer": ("visualbert", {}, ["answering"]),
    "two layers": ("uniter", {}, ["answering", "classifier"]),
}


def model_of(kind, **changes):
    return model_config(model_section(kind, text=TEXT, region_width=6, **changes).to_dict())


def begun(config, workdir):
    """The parameters that a run begins with, and its tokenizer."""
    with jax.set_mesh(mesh := make_mesh()):
        program, state, _ = begin(config, workdir, mesh)
    return state.params, program.task.tokenizer


def test_a_run_starts_from_converted_weights(tiny_config, tmp_path):
    fields = tiny_config.model.image.to_dict()
    assert fields.pop("kind") == "vit"
    image = ViTConfig(**{**fields, "image_size": 64})
    save_checkpoint(ImageModel(ImageModelConfig(image), nnx.Rngs(7)), tmp_path / "vit")
    tiny_config.init_from = str(tmp_path / "vit")
    tiny_config.data.image_size = 64
    params, _ = begun(tiny_config, tmp_path / "run")
    assert_same(params["image"], load_parameters(tmp_path / "vit")["image"])


def test_a_converted_text_encoder_needs_its_vocabulary(tiny_config, tmp_path):
    save_checkpoint(mmjax.load(BERT), tmp_path / "bert")
    tiny_config.init_from = str(tmp_path / "bert")
    with pytest.raises(InputError, match=r"set data\.vocabulary"):
        begun(tiny_config, tmp_path / "run")


def test_parts_start_from_public_weights(tiny_config, tmp_path, caplog):
    """Each part from a folder of its own, the words from the vocabulary that lies in one."""
    fields = tiny_config.model.image.to_dict()
    fields.pop("kind")
    vit = ViTConfig(**{**fields, "image_size": 64, "norm_tokens": True})
    mmjax.save_huggingface(ImageModel(ImageModelConfig(vit), nnx.Rngs(7)), tmp_path / "vit")
    bert = mmjax.load(BERT)
    words = [*SPECIAL_TOKENS, *(f"word{i}" for i in range(5, bert.config.text.vocabulary_size))]
    mmjax.save_huggingface(bert, tmp_path / "bert")
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(words))
    with tiny_config.unlocked():
        tiny_config.model = model_section(
            text=schema.describe(bert.config.text),
            image=tiny_config.model.image.to_dict(),
            fusion={"width": 16, "depth": 1, "heads": 2, "project": True},
        )
    tiny_config.init_from = {"image": str(tmp_path / "vit"), "text": str(tmp_path / "bert")}
    tiny_config.data.text_length = bert.config.text.max_length
    caplog.set_level("INFO", logger="absl")
    params, tokenizer = begun(tiny_config, tmp_path / "run")
    assert_same(params["text"], nnx.to_pure_dict(nnx.state(bert))["text"])
    image = nnx.to_pure_dict(nnx.state(mmjax.load(tmp_path / "vit")))["image"]
    assert_same(params["image"], image)
    assert tokenizer.tokens([7]) == ["word7"]
    # What one part left initial and another brought is not told as initial.
    assert caplog.text.count("Initialising from") == 2
    assert caplog.text.count("left at their initial value") == 1
    _, left = caplog.text.split("left at their initial value")
    assert "fusion/" in left
    assert "    image/blocks" not in left
    assert "    text/" not in left.partition("not used")[0]


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
    assert_same(*(tree["fusion"]["blocks"] for tree in (state.params, params)))


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
