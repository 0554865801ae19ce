"""ViLT: words and patches in one Transformer, with no encoder before it (Kim et al. 2021)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from mmjax.errors import InputError
from mmjax.layers import TABLE_INIT, LayerConfig, embedding, linear, split_key
from mmjax.models.bert import BertConfig, BertEmbeddings
from mmjax.models.features import Encoded, Fused, mask_of, shifted
from mmjax.models.heads import AnsweringHead, MaskedLanguageHead, MatchingHead
from mmjax.models.merged import Merged
from mmjax.models.model import Model, Moves
from mmjax.models.vit import normalise

# Rows of the table that tells the parts of the stream from one another.
WORDS, FIRST_PICTURE, SECOND_PICTURE = range(3)


@dataclass(frozen=True)
class ViltConfig(LayerConfig):
    """The Transformer, and what enters it. A head exists where its field is set."""

    vocabulary_size: int = 0
    max_length: int = 40  # of the position table of words
    padding: int = -1  # id of [PAD], whose vector then stays as it is; -1: trained like any other
    types: int = 2  # rows of the token-type table of words
    text_epsilon: float = 1e-12  # of the LayerNorms on words: below the layers, and in their head
    modalities: int = 2  # rows of the table of WORDS, FIRST_PICTURE, SECOND_PICTURE

    image_size: int = 384  # pixels a side, that the table of positions is for; pictures may differ
    patch_size: int = 32
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # of pixels in [0, 1], by channel
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    masked_language: bool = False
    tied: bool = True  # masked words are scored by the word table; false: by a table of their own
    matching: bool = False
    ranking: bool = False  # one score a pair, for retrieval
    answers: tuple[str, ...] = ()  # the closed list of a VQA head
    labels: tuple[str, ...] = ()  # what may be said of two pictures and a text (NLVR2)

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        super().__post_init__()
        size, patch = self.image_size, self.patch_size
        if type(size) is not int or not 1 <= patch <= size or size % patch:
            raise InputError(
                f"image_size is {size}: one number is expected, a multiple of patch_size, {patch}."
            )
        if self.labels and self.modalities <= SECOND_PICTURE:
            raise InputError(
                f"modalities is {self.modalities}, and labels are for two pictures: it takes "
                f"{SECOND_PICTURE + 1} to tell the second from the first."
            )

    @property
    def tasks(self) -> list[str]:
        """The fields of the heads that exist."""
        fields = ("masked_language", "matching", "ranking", "answers", "labels")
        return [name for name in fields if getattr(self, name)]

    @property
    def text(self) -> BertConfig:
        """What BERT's embeddings and its head are told."""
        return BertConfig(
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            activation=self.activation,
            epsilon=self.text_epsilon,
            dropout=self.dropout,
            dtype=self.dtype,
            vocabulary_size=self.vocabulary_size,
            max_length=self.max_length,
            padding=self.padding,
            types=self.types,
        )


class Vilt(Model):
    """ViltModel and its classes for masked words, questions, retrieval and reasoning."""

    # A ViT becomes the stream.
    adopts: ClassVar[Mapping[str, Moves]] = {
        "image": (
            ("image/patch", "image_embeddings/patch"),
            ("image/class_token", "image_embeddings/class_token"),
            ("image/position_embedding", "image_embeddings/position_embedding"),
            ("image/blocks", "fusion/blocks"),
            ("image/norm", "fusion/norm"),
        )
    }

    # A head, or None where the config has it not.
    reasoning: Any

    def __init__(self, config: ViltConfig, rngs: nnx.Rngs):
        self.config = config
        width, dtype = config.width, config.dtype
        self.text_embeddings = BertEmbeddings(config.text, rngs)
        self.image_embeddings = PatchEmbeddings(config, rngs)
        self.modality_embedding = embedding(config.modalities, width, dtype, rngs)
        self.fusion = Merged(config, rngs)
        self.masked_language = (
            MaskedLanguageHead(width, config.text, dtype, rngs, config.tied)
            if config.masked_language
            else None
        )
        self.matching = MatchingHead(width, rngs) if config.matching else None
        self.ranking = linear(width, 1, "float32", rngs) if config.ranking else None
        self.answering = (
            AnsweringHead(width, 2 * width, len(config.answers), dtype, rngs)
            if config.answers
            else None
        )
        self.reasoning = (
            AnsweringHead(2 * width, 2 * width, len(config.labels), dtype, rngs)
            if config.labels
            else None
        )

    @property
    def word_embeddings(self) -> BertEmbeddings:
        """The embeddings of words."""
        return self.text_embeddings

    def encode_text(
        self,
        text: Int[Array, "batch length"],
        text_mask: Bool[Array, "batch length"] | None = None,
        text_type: Int[Array, "batch length"] | None = None,
        key: Key[Array, ""] | None = None,
        text_shift: Float[Array, "batch length width"] | None = None,
    ) -> Encoded:
        """Vectors of token ids as they enter the stream; the first stands for all.

        `text_shift` is added to the words' vectors.
        """
        tokens = self.text_embeddings(text, text_mask, text_type, key, text_shift)
        return self._of_kind(WORDS, tokens, text_mask)

    def encode_image(
        self,
        image: Float[Array, "batch height width 3"] | UInt8[Array, "batch height width 3"],
        image_mask: Bool[Array, "batch height width"] | None = None,
        second: bool = False,
        key: Key[Array, ""] | None = None,
        image_shift: Float[Array, "batch length channels"] | None = None,
    ) -> Encoded:
        """Vectors of patches as they enter the stream; a class token in front stands for all.

        `image_mask` is true on the picture itself, at the top left, and false on what fills up the
        batch; `second` says that it is the other picture of a pair. `image_shift` is added to the
        vectors of the patches, and of the class token in front.
        """
        tokens, mask = self.image_embeddings(image, image_mask, key, image_shift)
        return self._of_kind(SECOND_PICTURE if second else FIRST_PICTURE, tokens, mask)

    def fuse(self, image: Encoded, text: Encoded, key: Key[Array, ""] | None = None) -> Fused:
        """Features of pairs: row i of the pictures with row i of the texts."""
        return self.fusion(image.tokens, text.tokens, image.mask, text.mask, key=key)

    def aligned(
        self, image: Encoded, text: Encoded
    ) -> tuple[Bool[Array, "batch patches"], Bool[Array, "batch length"]]:
        """True on patches and on words: not on the class token, [CLS] and the last token, [SEP]."""
        patches, words = mask_of(image), mask_of(text)
        places = jnp.arange(words.shape[1])
        inner = (places > 0) & (places < words.sum(axis=1, keepdims=True) - 1)
        return patches.at[:, 0].set(False), words & inner

    def forward(
        self,
        image: Float[Array, "batch height width 3"] | UInt8[Array, "batch height width 3"],
        text: Int[Array, "batch length"],
        text_mask: Bool[Array, "batch length"] | None = None,
        text_type: Int[Array, "batch length"] | None = None,
        image_mask: Bool[Array, "batch height width"] | None = None,
        image_b: Float[Array, "batch height_b width_b 3"]
        | UInt8[Array, "batch height_b width_b 3"]
        | None = None,
        image_mask_b: Bool[Array, "batch height_b width_b"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Any]:
        """`last_hidden_state [B,L+1+N,D]`, words first, `pooler_output [B,D]`, and the heads' say.

        That is `mlm_logits [B,L,V]`, `itm_logits [B,2]`, `rank_logits [B,1]`, `vqa_logits
        [B,answers]`. A second picture adds `nlvr_logits [B,labels]` and changes nothing else. The
        scores of a single head are called `logits`, as in Hugging Face's classes.
        """
        image_key, text_key, fusion_key, *second_keys = split_key(key, 5)
        encoded_text = self.encode_text(text, text_mask, text_type, text_key)
        encoded_image = self.encode_image(image, image_mask, key=image_key)
        fused = self.fuse(encoded_image, encoded_text, fusion_key)
        scores = {}
        if self.masked_language is not None:
            scores["mlm_logits"] = self.score_words(fused.text_tokens)
        if self.matching is not None:
            scores["itm_logits"] = self.match(fused)
        if self.ranking is not None:
            scores["rank_logits"] = self.rank(fused)[:, None]
        if self.answering is not None:
            scores["vqa_logits"] = self.score_answers(fused)
        if image_b is not None:
            if self.reasoning is None:
                raise InputError("image_b is given, but this ViLT has no head for two pictures.")
            encoded_image = self.encode_image(image_b, image_mask_b, True, second_keys[0])
            second = self.fuse(encoded_image, encoded_text, second_keys[1])
            both = jnp.concatenate([fused.pooled, second.pooled], axis=-1)
            scores["nlvr_logits"] = self.reasoning(both)
        tokens = jnp.concatenate([fused.text_tokens, fused.image_tokens], axis=1)
        out: dict[str, Any] = {"last_hidden_state": tokens, "pooler_output": fused.pooled}
        single = len(self.config.tasks) == 1
        return out | {"logits" if single else name: score for name, score in scores.items()}

    def _of_kind(self, kind, tokens, mask):
        tokens = tokens + self.modality_embedding(jnp.asarray(kind))
        return Encoded(tokens=tokens, mask=mask, pooled=tokens[:, 0])


class PatchEmbeddings(nnx.Module):
    """Patches of pictures of any size, and the positions of one size stretched over each.

    The original shuffles the patches, which changes nothing but their order in the stream, and
    drops some of them above a maximum, at random; here all stay, in their order.
    """

    def __init__(self, config: ViltConfig, rngs: nnx.Rngs):
        self.config = config
        width, side = config.width, config.patch_size
        positions = 1 + (config.image_size // side) ** 2
        self.patch = linear((side, side, 3), width, config.dtype, rngs)
        self.class_token = nnx.Param(TABLE_INIT(rngs.params(), (1, width)))
        self.position_embedding = nnx.Param(TABLE_INIT(rngs.params(), (positions, width)))
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(
        self,
        image: Float[Array, "batch height width 3"] | UInt8[Array, "batch height width 3"],
        image_mask: Bool[Array, "batch height width"] | None = None,
        key: Key[Array, ""] | None = None,
        shift: Float[Array, "batch tokens channels"] | None = None,
    ) -> tuple[Float[Array, "batch tokens channels"], Bool[Array, "batch tokens"] | None]:
        """Class token and patches, and a mask of them where there is one of the pixels.

        `shift` is added to their vectors.
        """
        config, side = self.config, self.config.patch_size
        if image.shape[1] % side or image.shape[2] % side:
            raise InputError(
                f"the pictures have {image.shape[1]}×{image.shape[2]} pixels, where multiples of "
                f"{side}, the patch's side, are expected: fill them up and give an image_mask."
            )
        if image.dtype == jnp.uint8:
            image = normalise(image, config.mean, config.std)
        patches = rearrange(
            image.astype(config.dtype), "b (h p) (w q) c -> b h w p q c", p=side, q=side
        )
        x = self.patch(patches)
        shape = x.shape[1:3]
        real = jnp.ones((1, *shape), bool) if image_mask is None else image_mask[:, ::side, ::side]
        x = (x + self._positions(real).astype(x.dtype)).reshape(len(x), -1, config.width)
        first = self.class_token[...] + self.position_embedding[:1]
        first = jnp.broadcast_to(first.astype(x.dtype), (len(x), 1, config.width))
        x = shifted(jnp.concatenate([first, x], axis=1), shift)
        x = self.dropout(x, deterministic=key is None, rngs=key)
        if image_mask is None:
            return x, None
        ones = jnp.ones((len(x), 1), bool)
        return x, jnp.concatenate([ones, real.reshape(len(x), -1)], axis=1)

    def _positions(self, real):
        side = self.config.image_size // self.config.patch_size
        grid = self.position_embedding[1:].reshape(side, side, -1)
        heights, widths = real[:, :, 0].sum(axis=1), real[:, 0, :].sum(axis=1)
        return stretch(grid, heights, widths, real.shape[1:])


def stretch(
    grid: Float[Array, "rows columns channels"],
    heights: Int[Array, " batch"],
    widths: Int[Array, " batch"],
    shape: tuple[int, int],
) -> Float[Array, "batch height width channels"]:
    """A grid laid bilinearly over the first `heights` × `widths` places of maps of one `shape`.

    Corners come to lie on corners, as with torch's `align_corners=True`; the other places are zero.
    """
    down = _bilinear(heights, shape[0], grid.shape[0])
    across = _bilinear(widths, shape[1], grid.shape[1])
    # Positions are added to everything that follows: a TPU would round them to bfloat16.
    precision = jax.lax.Precision.HIGHEST
    return jnp.einsum("bhr,bwc,rcd->bhwd", down, across, grid, precision=precision)


def _bilinear(lengths, new, old):
    """The [batch, new, old] weights of `old` points at the first `lengths` of `new` places."""
    places = jnp.arange(new)
    points = places * (old - 1) / jnp.maximum(lengths - 1, 1)[:, None]
    weights = jnp.maximum(1 - jnp.abs(points[..., None] - jnp.arange(old)), 0)
    return jnp.where((places < lengths[:, None])[..., None], weights, 0)
