"""Tiny models of words and regions, and a batch for them."""

from functools import cache
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmjax.models.lxmert import Lxmert, LxmertConfig
from mmjax.models.oscar import Oscar, OscarConfig
from mmjax.models.regions import StreamConfig
from mmjax.models.uniter import Uniter, UniterConfig
from mmjax.models.visualbert import VisualBert, VisualBertConfig
from mmjax.models.vl_bert import VlBert, VlBertConfig, VlBertTextConfig
from mmjax.objectives import Features, Masking
from tests.models import reference

WORDS, REGION_WIDTH, CLASSES, ATTRIBUTES = 30, 6, 5, 4
ANSWERS = ("no", "yes", "blue")
LAYERS = {"width": 24, "depth": 1, "heads": 3, "mlp_width": 20, "epsilon": 1e-6}
TEXT = {**LAYERS, "vocabulary_size": WORDS, "max_length": 16}
HEADS: dict[str, Any] = {"region_width": REGION_WIDTH, "masked_language": True, "answers": ANSWERS}

FAMILIES: dict[str, tuple[Any, Any]] = {
    "uniter": (
        Uniter,
        UniterConfig(
            StreamConfig(**TEXT),
            **HEADS,
            matching=True,
            ranking=True,
            region_features=True,
            region_classes=CLASSES,
        ),
    ),
    "lxmert": (
        Lxmert,
        LxmertConfig(
            StreamConfig(**TEXT),
            **HEADS,
            region_depth=1,
            fusion_depth=1,
            matching=True,
            region_objects=CLASSES,
            region_attributes=ATTRIBUTES,
            region_features=True,
        ),
    ),
    "vl_bert": (
        VlBert,
        VlBertConfig(
            VlBertTextConfig(**TEXT),
            **HEADS,
            whole_picture=True,
            box_width=4,
            matching=True,
            region_classes=CLASSES,
        ),
    ),
    "visualbert": (VisualBert, VisualBertConfig(StreamConfig(**TEXT), **HEADS, next_sentence=True)),
    "oscar": (Oscar, OscarConfig(StreamConfig(**TEXT), **HEADS, contrasts=3)),
}


@cache
def parts_of(family: str) -> tuple[nnx.GraphDef, Any]:
    """The structure of a family's model, and its parameters."""
    model, config = FAMILIES[family]
    return reference.split(lambda: model(config, nnx.Rngs(0)))


def batch(rows: int = 6, seed: int = 0) -> dict[str, np.ndarray]:
    """Texts and pictures of several lengths, the first two of one picture, the fourth invalid."""
    rng = np.random.default_rng(seed)
    length, count = 7, 5
    text_mask = np.arange(length) < rng.integers(3, length + 1, rows)[:, None]
    region_mask = np.arange(count) < rng.integers(2, count + 1, rows)[:, None]
    soft = rng.dirichlet(np.ones(CLASSES), (rows, count))
    image_id = np.arange(100, 100 + rows)
    image_id[1] = image_id[0]
    return {
        "text": np.where(text_mask, rng.integers(5, WORDS, (rows, length)), 0).astype(np.int32),
        "text_mask": text_mask,
        "regions": rng.normal(size=(rows, count, REGION_WIDTH)).astype(np.float32),
        "boxes": np.sort(rng.uniform(size=(rows, count, 2, 2)), axis=2)
        .reshape(rows, count, 4)
        .astype(np.float32),
        "region_mask": region_mask,
        "region_labels": rng.integers(0, CLASSES, (rows, count)).astype(np.int32),
        "region_attributes": rng.integers(0, ATTRIBUTES, (rows, count)).astype(np.int32),
        "region_distributions": soft.astype(np.float32),
        "answer": rng.choice([0, 0.3, 1], (rows, len(ANSWERS))).astype(np.float32),
        "image_id": image_id.astype(np.int32),
        "index": rng.permutation(1000)[:rows].astype(np.int32),
        "valid": np.arange(rows) != 3,
    }


def features(
    family: str,
    batch: Any,
    masking: Any = MappingProxyType({"regions": 0.5}),
    params: Any = None,
) -> Features:
    """Those of a batch, without dropout."""
    graph, own = parts_of(family)
    arrays = {name: jnp.array(array) for name, array in batch.items()}
    return Features(
        nnx.merge(graph, own if params is None else params),
        arrays,
        draws=jax.random.key(5),
        masking=Masking(**masking),
    )
