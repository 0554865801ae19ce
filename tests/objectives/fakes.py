"""What tests of objectives share: a model that hands on its input, batches, and devices."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from mmjax.data.tokenizer import TextTokenizer
from mmjax.models import Encoded, Fused
from mmjax.objectives import Features, Objective
from mmjax.sharding import to_device

# [PAD] [UNK] [CLS] [SEP] [MASK], and from CONTINUES on pieces that go on with a word.
WORDS, MASK, SPECIAL, CONTINUES = 50, 4, (0, 1, 2, 3, 4), 40


class FakeTokenizer(TextTokenizer):
    """Ids without words."""

    def __init__(self):
        self.vocabulary_size, self.mask_id, self.special_ids = WORDS, MASK, SPECIAL
        self.continues = np.arange(WORDS) >= CONTINUES


class FakeModel:
    """Encoders that hand on what they are given: numbers [B,L], vectors [B,D] or [B,L,D].

    A pair's pooled vector is both of theirs, and its similarity their product. Heads, or whatever
    else a test needs, are given by name.
    """

    def __init__(self, scale: Any = 10.0, bias: Any = 0.0, **parts: Any):
        self.config = SimpleNamespace(image=SimpleNamespace(pool="mean"))
        self.contrastive = FakeContrastiveHead(scale, bias)
        vars(self).update(parts)

    def encode_image(self, image, key=None):
        return encoded(image)

    def encode_text(self, text, text_mask=None, key=None):
        return encoded(text, text_mask)

    def fuse(self, image, text, key=None):
        pooled = jnp.concatenate([image.pooled, text.pooled], axis=1)
        return Fused(image_tokens=image.tokens, text_tokens=text.tokens, pooled=pooled)

    def embed_image(self, image):
        return image.pooled

    def embed_text(self, text):
        return text.pooled


class FakeContrastiveHead:
    """Takes vectors as they are."""

    def __init__(self, scale: Any, bias: Any):
        self.scale, self.offset = jnp.array(scale, jnp.float32), jnp.array(bias, jnp.float32)

    def image(self, vectors):
        return vectors

    def text(self, vectors):
        return vectors

    def logits(self, images, texts):
        return self.scale * images @ texts.T + self.offset


def encoded(x: jax.Array, mask: jax.Array | None = None) -> Encoded:
    """The first token is the pooled vector."""
    if jnp.issubdtype(x.dtype, jnp.integer):
        tokens = x[..., None].astype(jnp.float32)
    else:
        tokens = x if x.ndim == 3 else x[:, None]
    return Encoded(tokens=tokens, mask=mask, pooled=tokens[:, 0])


def batch_of(rows: int, **fields: Any) -> dict[str, jax.Array]:
    """Valid examples of different pictures, but for what `fields` say."""
    numbers = np.arange(rows, dtype=np.int32)
    given = {"image_id": numbers, "index": numbers, "valid": np.ones(rows, bool), **fields}
    return {name: jnp.array(value) for name, value in given.items()}


def unit_vectors(*shape: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def negative_probabilities(
    logits: np.ndarray, allowed: np.ndarray, evenly: float = 0.0
) -> np.ndarray:
    """What a negative of each row is drawn by: softmax over the allowed ones, or evenly."""
    hard = np.where(allowed, np.exp(np.float64(logits)), 0)
    even = allowed / allowed.sum(axis=1, keepdims=True).clip(1)
    return (1 - evenly) * hard / hard.sum(axis=1, keepdims=True).clip(1e-300) + evenly * even


def loss_on(devices: int, objective: Objective, batch: dict[str, jax.Array], scale: float) -> Any:
    """The loss, and its mean's gradient by pictures and scale, the batch split over so many."""
    mesh = jax.make_mesh(
        (devices, 1, 1),
        ("data", "fsdp", "tensor"),
        (AxisType.Auto,) * 3,
        devices=jax.devices()[:devices],
    )

    def mean(differentiated, batch):
        image, scale = differentiated
        features = Features(FakeModel(scale), {**batch, "image": image})
        loss = objective(features, jax.random.key(0))
        return loss.total / loss.weight, (loss.total, loss.weight, loss.metrics, loss.scores)

    with jax.set_mesh(mesh):
        batch = to_device(jax.tree.map(np.asarray, batch), mesh)
        differentiated = batch["image"], jnp.array(scale)
        return jax.device_get(jax.jit(jax.grad(mean, has_aux=True))(differentiated, batch))
