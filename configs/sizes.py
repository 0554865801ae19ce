"""The other size that every recipe in `pretrain/` and `finetune/` has: `--config=FILE.py:tiny`."""

from collections.abc import Callable

from ml_collections import ConfigDict

from mmjax.data.scenes import REGION_FEATURES
from mmjax.errors import InputError

_LAYERS = {"width": 32, "depth": 2, "heads": 2, "mlp_width": 64}


def sized(
    config: ConfigDict, arg: str | None, adapt: Callable[[ConfigDict], None] = lambda _: None
):
    """The recipe as it stands, or, where `arg` is 'tiny', one that a laptop runs in a minute.

    Tiny keeps what the recipe is about, its model's structure and its objectives, and trains it on
    drawn scenes: two narrow layers of everything, no outside weights or files, no dropout, no
    warm-up (so that one step is a run). `adapt` sets what only this recipe has.
    """
    if arg is None:
        return config
    if arg != "tiny":
        raise InputError(f"the recipe takes ':tiny' or nothing, not {arg!r}.")
    config.total_steps, config.batch_size = 200, 16
    config.init_from = ""
    config.data.update(source="scenes", root="", size=0, vocabulary="")
    config.data.update(image_size=64, text_length=32, crop_scale=1.0, flip=False)
    for part in _parts(config.model):
        _shrink(part)
    config.optimizer.update(learning_rate=2e-3, weight_decay=0.0, accumulate=1)
    config.optimizer.schedule.update(kind="constant", warmup_steps=0, cooldown_steps=0)
    config.checkpoint.every = config.eval.every = 0
    config.log.every = 10
    adapt(config)
    return config


def _shrink(part: ConfigDict) -> None:
    """Make small what the part has of these fields; a 0 that means "off" or "as the data" stays."""
    if "depth" in part and "heads" in part:
        part.update(_LAYERS)
    if "patch_size" in part:
        part.patch_size = 16
    small = {
        "size": "",
        "max_length": 48,
        "embedding_width": 32,
        "region_width": REGION_FEATURES,
        "image_size": 0,
        "vocabulary_size": 0,
        "dropout": 0.0,
        "dtype": "float32",
        "remat": "none",
        "unroll": False,
    }
    part.update({name: value for name, value in small.items() if part.get(name)})


def _parts(section: ConfigDict):
    """The section and all that are in it."""
    yield section
    for value in section.values():
        if isinstance(value, ConfigDict):
            yield from _parts(value)
