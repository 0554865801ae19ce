"""A planned step is the step that would run: beside batches and states that are really there."""

import importlib

import jax
import pytest

from mmjax.chips import CHIPS
from mmjax.data import load_source, make_transform
from mmjax.data.pipeline import train_batches
from mmjax.errors import InputError
from mmjax.plan.assembly import assemble
from mmjax.plan.compiler import compile_step
from mmjax.plan.topology import Topology
from mmjax.sharding import BATCH_AXES, make_mesh
from mmjax.training.state import init_state

RECIPES = [  # of every task, with all the fields that a batch can have
    "pretrain.lxmert",
    "pretrain.oscar_base",
    "pretrain.flava",
    "finetune.quickstart_vqa",
]


def recipe(name):
    return importlib.import_module(f"configs.{name}").get_config("tiny")


@pytest.mark.parametrize("name", RECIPES)
def test_the_batch_is_the_recipes(name):
    config = recipe(name)
    config.init_from = ""
    program, batch = assemble(config, make_mesh())
    source = load_source(program.config.data.to_dict())
    transform = make_transform(
        program.config.data.to_dict(),
        program.task.tokenizer,
        getattr(program.model, "answers", ()),
        augment=True,
        question_only=config.question_only,
    )
    real = next(train_batches(source, transform, batch_size=config.batch_size, seed=0, threads=0))
    assert {key: (array.shape, array.dtype) for key, array in real.items()} == {
        key: (array.shape, array.dtype) for key, array in batch.items()
    }
    assert all(array.sharding.spec[0] == BATCH_AXES for array in batch.values())


def test_files_need_not_be_there():
    config = recipe("pretrain.siglip_b16")
    config.data.source, config.data.root = "flickr8k", "/nowhere"
    program, _ = assemble(config, make_mesh())
    # Nobody knows how many words the texts will give: as many as the recipe allows.
    assert program.config.model.text.vocabulary_size == config.data.vocabulary_size


def test_answers_of_a_source_that_is_not_there_are_not_made_up():
    config = recipe("finetune.quickstart_vqa")
    config.init_from, config.data.source = "", "elsewhere"
    with pytest.raises(InputError, match=r"model\.answers"):
        assemble(config, make_mesh())


def test_a_device_holds_what_a_real_state_would_lay_on_it(tiny_config):
    tiny_config.unlock()
    tiny_config.mesh.fsdp = 4
    step = compile_step(tiny_config, Topology("v5e:4x2", CHIPS["v5e"], jax.devices()))
    assert step.mesh == {"data": 2, "fsdp": 4, "tensor": 1}
    program, _ = assemble(tiny_config, make_mesh(fsdp=4))
    state = init_state(program.contents, make_mesh(fsdp=4), seed=0)
    assert step.state_bytes["parameters"] == sum(
        leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state.params)
    )
    assert sum(step.parameters.values()) == sum(x.size for x in jax.tree.leaves(state.params))
    memory = step.memory
    assert memory.arguments <= memory.peak <= memory.arguments + memory.temporary + memory.output
