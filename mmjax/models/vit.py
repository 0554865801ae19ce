"""The Vision Transformer (Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words")."""

from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Key, UInt8

from mmjax.errors import InputError, near_misses
from mmjax.layers import (
    TABLE_INIT,
    Attention,
    Block,
    LayerConfig,
    MlpSublayer,
    Stack,
    layer_norm,
    linear,
    split_key,
)
from mmjax.models.features import Encoded, shifted

# width, depth, heads, MLP width: the paper's table 1, and Touvron et al. 2021 (DeiT) for Ti and S.
SIZES = {
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "H": (1280, 32, 16, 5120),
}


@dataclass(frozen=True)
class ViTConfig(LayerConfig):
    """A ViT by name (`size='B/16'`) or by explicit widths; a width given beside a name wins."""

    size: str = ""
    image_size: int | tuple[int, int] = 224  # pixels a side, or (height, width)
    patch_size: int | tuple[int, int] = 0
    patch_bias: bool = True
    embedding_norm: bool = False  # a LayerNorm before the first block (CLIP)
    pool: str = "class_token"  # 'class_token', 'mean', or 'attention' (Zhai et al. 2022)
    norm_tokens: bool = True  # false: the final LayerNorm is for the class token alone (CLIP)
    pooler: bool = False  # a dense layer and tanh on the pooled vector
    mean: tuple[float, ...] = field(default=(0.5, 0.5, 0.5))  # of pixels in [0, 1], by channel
    std: tuple[float, ...] = field(default=(0.5, 0.5, 0.5))

    def __post_init__(self) -> None:
        """Fill widths from the named size."""
        if self.size:
            letters, _, patch = self.size.partition("/")
            if letters not in SIZES or not patch.isdigit():
                raise InputError(
                    f"image size {self.size!r} is unknown: it reads 'WIDTH/PATCH', as B/16."
                    + near_misses(letters, SIZES)
                )
            self.fill_widths(*SIZES[letters])
            object.__setattr__(self, "patch_size", self.patch_size or int(patch))
        super().__post_init__()
        for pixels, side in zip(pair(self.image_size), pair(self.patch_size), strict=True):
            if side < 1 or pixels < 1 or pixels % side:
                raise InputError(
                    f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}."
                )
        if self.pool not in (pools := ["class_token", "mean", "attention"]):
            raise InputError(f"image pool is {self.pool!r}.{near_misses(self.pool, pools)}")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        (height, width), (down, across) = pair(self.image_size), pair(self.patch_size)
        return height // down, width // across


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a size that may be given as one number."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


class ViT(nnx.Module):
    """Patches, learnt positions, pre-norm blocks, a final LayerNorm, and a pooled vector."""

    def __init__(self, config: ViTConfig, rngs: nnx.Rngs):
        self.config = config
        width, dtype = config.width, config.dtype
        patches = config.grid[0] * config.grid[1]
        self.patch = linear((*pair(config.patch_size), 3), width, dtype, rngs, config.patch_bias)
        has_class = config.pool == "class_token"
        self.class_token = nnx.Param(TABLE_INIT(rngs.params(), (1, width))) if has_class else None
        self.position_embedding = nnx.Param(TABLE_INIT(rngs.params(), (patches + has_class, width)))
        self.embedding_norm = (
            layer_norm(width, config.epsilon, dtype, rngs) if config.embedding_norm else None
        )
        self.dropout = nnx.Dropout(config.dropout)
        self.blocks = Stack(lambda rngs: Block(config, rngs), config, rngs)
        self.norm = layer_norm(width, config.epsilon, dtype, rngs)
        self.pooling = AttentionPool(config, rngs) if config.pool == "attention" else None
        self.pooler = linear(width, width, dtype, rngs) if config.pooler else None

    def __call__(
        self,
        image: Float[Array, "batch height width 3"] | UInt8[Array, "batch height width 3"],
        key: Key[Array, ""] | None = None,
        shift: Float[Array, "batch length channels"] | None = None,
    ) -> Encoded:
        """Encode pictures: uint8 ones are normalised here, float ones are taken as normalised.

        `shift` is added to the vectors of the patches, and of the class token in front.
        """
        key, embedding_key = split_key(key, 2)
        tokens = self.blocks(self.embed(image, embedding_key, shift), key=key)
        if not self.config.norm_tokens:
            return Encoded(tokens=tokens, mask=None, pooled=self.norm(tokens[:, 0]))
        tokens = self.norm(tokens)
        return Encoded(tokens=tokens, mask=None, pooled=self._pool(tokens))

    def embed(
        self,
        image: Float[Array, "batch height width 3"] | UInt8[Array, "batch height width 3"],
        key: Key[Array, ""] | None = None,
        shift: Float[Array, "batch length channels"] | None = None,
    ) -> Float[Array, "batch length channels"]:
        """What enters the first block: the patches in their places, behind the class token."""
        config = self.config
        if image.shape[1:3] != (size := pair(config.image_size)):
            raise InputError(
                f"the image encoder takes {size[0]}×{size[1]} pixels and the batch has "
                f"{image.shape[1]}×{image.shape[2]}: let data.image_size and "
                "model.image.image_size agree, or load with image_size=…."
            )
        if image.dtype == jnp.uint8:
            image = normalise(image, config.mean, config.std)
        down, across = pair(config.patch_size)
        patches = rearrange(
            image.astype(config.dtype), "b (h p) (w q) c -> b (h w) p q c", p=down, q=across
        )
        x = self.patch(patches)
        if self.class_token is not None:
            token = jnp.broadcast_to(
                self.class_token[...].astype(x.dtype), (x.shape[0], 1, x.shape[2])
            )
            x = jnp.concatenate([token, x], axis=1)
        x = shifted(x + self.position_embedding[...].astype(x.dtype), shift)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        return self.dropout(x, deterministic=key is None, rngs=key)

    def _pool(self, tokens):
        if self.pooling is not None:
            return self.pooling(tokens)
        pooled = tokens[:, 0] if self.config.pool == "class_token" else tokens.mean(axis=1)
        return pooled if self.pooler is None else jnp.tanh(self.pooler(pooled))


class AttentionPool(nnx.Module):
    """One learnt query attends to all tokens (Zhai et al. 2022, "Scaling Vision Transformers")."""

    def __init__(self, config: ViTConfig, rngs: nnx.Rngs):
        self.query = nnx.Param(TABLE_INIT(rngs.params(), (1, config.width)))
        self.attention = Attention(config, rngs)
        self.mlp = MlpSublayer(config, rngs)

    def __call__(self, tokens: Float[Array, "batch length width"]) -> Float[Array, "batch width"]:
        """One vector a picture."""
        query = jnp.broadcast_to(
            self.query[...].astype(tokens.dtype), (tokens.shape[0], 1, tokens.shape[2])
        )
        return self.mlp(self.attention(query, tokens))[:, 0]


def normalise(
    image: UInt8[Array, "batch height width 3"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "batch height width 3"]:
    """Pixels 0..255 to zero mean and unit deviation: (pixel / 255 - mean) / std, by channel."""
    mean_3, std_3 = (jnp.asarray(x, jnp.float32) for x in (mean, std))
    return (image.astype(jnp.float32) / 255 - mean_3) / std_3


def resize_position_embedding(
    positions: Float[np.ndarray, "old width"], new_length: int
) -> Float[np.ndarray, "new width"]:
    """Position embeddings of a square grid for another square grid, bicubic as in DeiT and ALBEF.

    The kernel is torch's (a = -0.75, align_corners false, no antialiasing), which
    `jax.image.resize` does not offer. A class token in front, told by the count, is kept as it is.

    Raises InputError where a length is neither a square nor a square and one.
    """
    old_side, old_class = _square(len(positions))
    new_side, new_class = _square(new_length)
    if old_class != new_class:
        raise InputError(
            f"position embeddings of {len(positions)} and of {new_length} rows: one has a class "
            "token and the other has none, so they cannot be resized into each other."
        )
    kept, grid = positions[:old_class], positions[old_class:]
    matrix = _bicubic_matrix(old_side, new_side)
    grid = grid.reshape(old_side, old_side, -1).astype(np.float64)
    grid = np.einsum("ih,jw,hwd->ijd", matrix, matrix, grid).reshape(new_side**2, -1)
    return np.concatenate([kept, grid.astype(positions.dtype)])


def _square(length: int) -> tuple[int, int]:
    """The side of the grid, and how many tokens (0 or 1) stand before it."""
    for extra in (0, 1):
        side = int(np.sqrt(length - extra) + 0.5)
        if side**2 == length - extra:
            return side, extra
    raise InputError(f"{length} position embeddings are no square grid, with or without a token.")


def _bicubic_matrix(old: int, new: int, a: float = -0.75) -> np.ndarray:
    """The [new, old] weights of bicubic interpolation (Keys 1981) with clamped borders."""
    matrix = np.zeros((new, old))
    for row in range(new):
        centre = (row + 0.5) * old / new - 0.5
        first = int(np.floor(centre)) - 1
        for tap in range(first, first + 4):
            t = abs(centre - tap)
            if t <= 1:
                weight = (a + 2) * t**3 - (a + 3) * t**2 + 1
            else:
                weight = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
            matrix[row, np.clip(tap, 0, old - 1)] += weight
    return matrix
