"""A teacher is loaded from wherever weights come from, and refused where it cannot teach."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

import mmjax
from mmjax.data.tokenizer import SPECIAL_TOKENS, TextTokenizer
from mmjax.errors import InputError
from mmjax.models import VisionLanguageModel
from mmjax.objectives import Features
from mmjax.objectives.contrastive import Contrastive
from mmjax.objectives.distillation import SimilarityDistillation
from mmjax.objectives.feature_distillation import EmbeddingDistillation
from mmjax.rules import by_path
from mmjax.schema import describe
from mmjax.sharding import make_mesh, tree_shardings
from mmjax.training.checkpoints import Checkpointer
from mmjax.training.teacher import load_teacher, teacher_tokenizer
from tests.models.reference import split, tiny_batch, tiny_model, tiny_tokenizer

GOLDENS = Path(__file__).parents[1] / "goldens"
LEARNING = {"similarity_distillation": SimilarityDistillation(weight=1.0)}
LOOKING = {"embedding_distillation": EmbeddingDistillation(weight=1.0, of=("image",))}
MODEL = tiny_model()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A work directory of ours, with a moving average: its parameters, and the average's."""
    folder = tmp_path_factory.mktemp("run")
    params = split(lambda: VisionLanguageModel(MODEL, nnx.Rngs(0)))[1]
    average = jax.tree.map(lambda x: x + 1, params)
    state = {"step": jnp.array(3), "params": params, "ema": average}
    config = {
        "model": {"kind": "vision_language", **describe(MODEL)},
        "optimizer": {"ema_decay": 0.9},
    }
    with Checkpointer(folder, every=0, keep=1) as checkpointer:
        assets = {"config": config, "tokenizer": tiny_tokenizer().to_json()}
        checkpointer.save(3, state, assets, force=True)
    return folder, average


@pytest.fixture
def published(tmp_path):
    """A folder of public weights of 20 words, and the tokenizer of its vocab.txt."""
    folder = tmp_path / "published"
    shutil.copytree(GOLDENS / "vision-text-dual-encoder", folder)
    words = [*SPECIAL_TOKENS, *(f"w{i}" for i in range(15))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return folder, TextTokenizer.from_vocabulary(folder / "vocab.txt")


def config_of(checkpoint, image_size=24, text_length=11):
    return ConfigDict(
        {
            "teacher": {"checkpoint": str(checkpoint)},
            "data": {"image_size": image_size, "text_length": text_length},
        }
    )


def test_a_run_of_ours_teaches_by_its_moving_average_wherever_its_parameters_lie(run):
    folder, average = run
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    teacher = load_teacher(config_of(f"{folder}@latest"), LEARNING, tiny_tokenizer(), mesh)
    assert teacher.config == MODEL
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(teacher.params), average)
    layout = tree_shardings(teacher.params, mesh)
    jax.tree.map(
        lambda x, sharding: x.sharding.is_equivalent_to(sharding, x.ndim) or pytest.fail(str(x)),
        teacher.params,
        layout,
    )
    up = by_path(teacher.params)["image/blocks/layers/mlp/up/kernel"]
    assert up.addressable_shards[0].data.shape == (2, 16, 32)
    model = nnx.merge(teacher.graph, teacher.params)
    batch = jax.tree.map(jnp.asarray, tiny_batch(MODEL, 8))
    features = Features(model, batch, tokenizer=tiny_tokenizer(), reference=model)
    loss = SimilarityDistillation()(features, jax.random.key(0))
    np.testing.assert_allclose(loss.total, 0, atol=1e-5)


@pytest.mark.parametrize("vocabulary", ["vocab.txt", "tokenizer.json", ""])
def test_public_weights_teach_where_the_same_ids_are_the_same_words(published, vocabulary):
    folder, tokenizer = published
    if vocabulary != "vocab.txt":
        (folder / "vocab.txt").unlink()
    if vocabulary == "tokenizer.json":
        (folder / vocabulary).write_text(tokenizer.to_json())
    teacher = load_teacher(config_of(folder, 16), LEARNING, tokenizer, make_mesh())
    loaded = nnx.to_pure_dict(nnx.state(mmjax.load(folder)))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(teacher.params), loaded)


def test_a_vocabulary_may_go_on_behind_ours(published):
    folder, _ = published
    fewer = folder.parent / "vocab.txt"
    fewer.write_text("\n".join((folder / "vocab.txt").read_text().split("\n")[:12]) + "\n")
    tokenizer = TextTokenizer.from_vocabulary(fewer)
    assert load_teacher(config_of(folder, 16), LEARNING, tokenizer, make_mesh())


def test_other_words_are_refused(published, run):
    folder, tokenizer = published
    with pytest.raises(InputError, match=r"id 5 is 'w0' here and 'word5' there"):
        load_teacher(config_of(run[0]), LEARNING, tokenizer, make_mesh())
    with pytest.raises(InputError, match=r"id 5 is 'word5' here and 'w0' there"):
        load_teacher(config_of(folder, 16), LEARNING, tiny_tokenizer(), make_mesh())
    lines = (folder / "vocab.txt").read_text().rstrip("\n").split("\n")
    (folder / "vocab.txt").write_text("\n".join(lines[:-2]) + "\n")
    with pytest.raises(InputError, match=r"id 18 is 'w13' here and none there"):
        load_teacher(config_of(folder, 16), LEARNING, tokenizer, make_mesh())
    (folder / "vocab.txt").unlink()
    with pytest.raises(InputError, match=r"no vocabulary beside it, .*\[20\] rows .* 40 words"):
        load_teacher(config_of(folder, 16), LEARNING, tiny_tokenizer(), make_mesh())


def test_a_student_reads_in_the_words_of_its_teacher(published, run):
    assert teacher_tokenizer("") is None
    assert teacher_tokenizer(GOLDENS / "clip") is None
    found = teacher_tokenizer(str(run[0])), teacher_tokenizer(str(published[0]))
    assert [x.to_json() for x in found] == [tiny_tokenizer().to_json(), published[1].to_json()]


def test_words_do_not_matter_where_pictures_alone_are_compared(published):
    config = config_of(published[0], 16, text_length=100)
    assert load_teacher(config, LOOKING, tiny_tokenizer(), make_mesh())


def test_pictures_and_texts_must_fit(published, run):
    folder, tokenizer = published
    with pytest.raises(InputError, match=r"16×16 pixels, and data\.image_size is 24"):
        load_teacher(config_of(folder), LOOKING, tokenizer, make_mesh())
    with pytest.raises(InputError, match=r"at most 12 tokens, and data\.text_length is 13"):
        load_teacher(config_of(folder, 16, 13), LEARNING, tokenizer, make_mesh())
    assert load_teacher(config_of(folder, 16, 12), LEARNING, tokenizer, make_mesh())


def test_a_teacher_is_named_where_one_is_needed_and_only_there(run):
    ordinary = {"contrastive": Contrastive(weight=1.0)}
    assert load_teacher(config_of(""), ordinary, tiny_tokenizer(), make_mesh()) is None
    with pytest.raises(InputError, match=r"similarity_distillation .* config\.teacher\.checkpoint"):
        load_teacher(config_of(""), LEARNING, tiny_tokenizer(), make_mesh())
    with pytest.raises(InputError, match="nothing is learnt from it"):
        load_teacher(config_of(run[0]), ordinary, tiny_tokenizer(), make_mesh())


def test_a_damaged_vocabulary_is_named(published):
    folder, tokenizer = published
    (folder / "vocab.txt").unlink()
    (folder / "tokenizer.json").write_text(json.dumps({"model": 3}))
    with pytest.raises(InputError, match=r"tokenizer\.json cannot be read"):
        load_teacher(config_of(folder, 16), LEARNING, tokenizer, make_mesh())
