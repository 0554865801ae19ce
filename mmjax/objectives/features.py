"""The features that the objectives of one step share."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from mmjax.attention_maps import LastLayer, SelfAttention, last_layers
from mmjax.data.tokenizer import TextTokenizer
from mmjax.models import Encoded, Fused
from mmjax.models.model import taken
from mmjax.objectives.loss import example_keys, purpose_key
from mmjax.objectives.masking import Masking, choose, choose_blocks, mask_tokens
from mmjax.objectives.walk import Scale, Side, Walk


@dataclass(frozen=True)
class Masked:
    """A pass through the model with part of its input hidden."""

    chosen: Bool[Array, "batch places"]  # what is to be guessed
    text: Int[Array, "batch length"]  # as the model read it
    image: Encoded  # both modalities before they met
    read: Encoded
    fused: Fused


class Features:
    """The encodings of one batch, each computed when the first objective asks for it.

    Models take the fields of the batch that they have parameters for, by name.

    Args:
        model: any model with `encode_image`, `encode_text` and, for most objectives, `fuse`.
        batch: the fields of the batch.
        key: draws dropout; None is evaluation.
        draws: draws masks, by example.
        tokenizer: what the token ids mean.
        masking: which share of words, regions and patches is hidden where some are to be guessed.
        step: of the run, counted from 0; None in evaluation.
        memory: what the objectives carry from step to step, by objective and name.
        average: the same model under the moving average of its parameters, where there is one.
        reference: another model, whose outputs are learnt from (distillation).
        shifts: fields that are added to the batch: perturbations of embedded inputs, `text_shift`
            and `image_shift`.
        embeddings: as of `embeddings`, where they are known already.
    """

    def __init__(
        self,
        model: Any,
        batch: Mapping[str, Array],
        key: Key[Array, ""] | None = None,
        *,
        draws: Key[Array, ""] | None = None,
        tokenizer: TextTokenizer | None = None,
        masking: Masking | None = None,
        step: Int[Array, ""] | None = None,
        memory: Mapping[str, Mapping[str, Array]] | None = None,
        average: Any = None,
        reference: Any = None,
        shifts: Mapping[str, Array] | None = None,
        embeddings: Mapping[str, tuple[Array, Array]] | None = None,
    ):
        self.model, self.batch, self.key = model, batch, key
        self.draws = jax.random.key(0) if draws is None else draws
        self.tokenizer: Any = tokenizer
        self.masking = Masking() if masking is None else masking
        self.step, self.memory, self.shifts = step, memory or {}, shifts or {}
        self.average = None if average is None else self._of(average)
        self.reference = None if reference is None else self._of(reference)
        for owner, known in (embeddings or {}).items():
            of = self if owner == "own" else getattr(self, owner)
            of.image_embedding, of.text_embedding = known

    def _of(self, model: Any) -> "Features":
        """Another model's features of the same batch under the same masks, without dropout."""
        return Features(
            model, self.batch, draws=self.draws, tokenizer=self.tokenizer, masking=self.masking
        )

    def dropout_key(self, purpose: str) -> Key[Array, ""] | None:
        """The key of one pass through the model."""
        return None if self.key is None else purpose_key(self.key, f"dropout/{purpose}")

    @jax.named_scope("image")
    def encode_image(self, purpose: str, **changes: Any) -> Encoded:
        """The pictures, encoded, with some fields of the batch changed."""
        return self._call(self.model.encode_image, purpose, changes)

    @jax.named_scope("text")
    def encode_text(self, purpose: str, **changes: Any) -> Encoded:
        """The texts, encoded, with some fields of the batch changed."""
        return self._call(self.model.encode_text, purpose, changes)

    @jax.named_scope("fusion")
    def fuse(self, image: Encoded, text: Encoded, purpose: str) -> Fused:
        """Row i of the pictures with row i of the texts."""
        with last_layers() as self._stacks[purpose]:
            return self.model.fuse(image, text, key=self.dropout_key(purpose))

    def attention(self, part: str) -> list[SelfAttention]:
        """How tokens look at one another in the last layer of 'image', 'text' or 'fusion'.

        Those of two streams, the picture's first, are two; without any layer there is none.
        """
        getattr(self, "fused" if part == "fusion" else part)  # has run, or runs now
        stacks = self._stacks[part]
        return stacks[-1]() if stacks else []

    @cached_property
    def _stacks(self) -> dict[str, list[LastLayer]]:
        """Of layers, that ran in each pass, by its purpose."""
        return {}

    @cached_property
    def image(self) -> Encoded:
        """The pictures, encoded."""
        return self.encode_image("image")

    @cached_property
    def text(self) -> Encoded:
        """The texts, encoded."""
        return self.encode_text("text")

    @cached_property
    def fused(self) -> Fused:
        """Each picture fused with its own text."""
        return self.fuse(self.image, self.text, "fusion")

    @cached_property
    def image_embedding(self) -> Float[Array, "batch embedding"]:
        """Unit vectors of the pictures."""
        return self.model.embed_image(self.image)

    @cached_property
    def text_embedding(self) -> Float[Array, "batch embedding"]:
        """Unit vectors of the texts."""
        return self.model.embed_text(self.text)

    @property
    def embeddings(self) -> dict[str, tuple[Array, Array]]:
        """Of pictures and texts, the model's 'own' and, where there is one, the 'average'."""
        of = {"own": self} | ({} if self.average is None else {"average": self.average})
        return {owner: (each.image_embedding, each.text_embedding) for owner, each in of.items()}

    @cached_property
    def similarity_logits(self) -> Float[Array, "batch batch"]:
        """Scaled cosines of every picture (rows) with every text of the global batch.

        All of them at once, which a large batch has no memory for: see `walk`.
        """
        return self.model.contrastive.logits(self.image_embedding, self.text_embedding)

    def walk(self, of: str, by_average: bool = False) -> Walk:
        """Each picture (`of='image'`) or text beside all of the other side of the global batch.

        With `by_average` the moving average has encoded what they are compared with, and is their
        teacher. What several objectives ask of one kind of walk is answered by one.
        """
        if (of, by_average) not in self._walks:
            self._walks[of, by_average] = self._start_walk(of, by_average)
        return self._walks[of, by_average]

    @cached_property
    def _walks(self) -> dict[tuple[str, bool], Walk]:
        return {}

    def _start_walk(self, of: str, by_average: bool) -> Walk:
        other = {"image": "text", "text": "image"}[of]
        rows, known = self.vectors(of), (self.average if by_average else None) or self
        head, batch = self.model.contrastive, self.batch
        scale = Scale(head.scale, head.offset)
        marks = batch["image_id"], batch["valid"], batch["index"], jnp.arange(len(rows))
        teacher = None if known is self else known.vectors(of)
        candidates = Side(known.vectors(other), *marks)
        return Walk(scale, Side(rows, *marks, teacher), candidates, learns=known is self)

    def vectors(self, of: str) -> Float[Array, "batch embedding"]:
        """Unit vectors of pictures ('image') or of texts."""
        return self.image_embedding if of == "image" else self.text_embedding

    @cached_property
    def words_masked(self) -> Masked:
        """The pass in which words are to be guessed, from the others and the whole picture.

        With `masking.conditional=False` regions or patches are hidden in the same pass.
        """
        text, chosen = self._masked_text
        if not self.masking.conditional:
            return self._jointly_masked(chosen)
        image, read = self.image, self._masked_reading
        return Masked(chosen, text, image, read, self.fuse(image, read, "masked fusion"))

    @cached_property
    def regions_masked(self) -> Masked:
        """The pass in which regions are to be guessed, from the others and the whole text."""
        return self._image_masked(self._chosen_regions)

    @cached_property
    def patches_masked(self) -> Masked:
        """The pass in which codes of patches are to be guessed, as in `regions_masked`."""
        return self._image_masked(self._chosen_patches)

    def _image_masked(self, chosen: Bool[Array, "batch places"]) -> Masked:
        if not self.masking.conditional:
            return self._jointly_masked(chosen)
        image, read = self._masked_image, self.text
        fused = self.fuse(image, read, "masked image fusion")
        return Masked(chosen, self.batch["text"], image, read, fused)

    def _jointly_masked(self, chosen: Bool[Array, "batch places"]) -> Masked:
        image, read = self._masked_image, self._masked_reading
        return Masked(chosen, self._masked_text[0], image, read, self._masked_fusion)

    @cached_property
    def maskable_words(self) -> Bool[Array, "batch length"]:
        """The words that may be hidden: no special tokens, padding or invalid rows."""
        special = jnp.isin(self.batch["text"], jnp.asarray(self.tokenizer.special_ids))
        return self.batch["text_mask"] & ~special & self.batch["valid"][:, None]

    @cached_property
    def _masked_text(self) -> tuple[Int[Array, "batch length"], Bool[Array, "batch length"]]:
        text, tokenizer = self.batch["text"], self.tokenizer
        return mask_tokens(
            text,
            self.maskable_words,
            example_keys(purpose_key(self.draws, "masked_language"), self.batch["index"]),
            rate=self.masking.words,
            mask_id=tokenizer.mask_id,
            vocabulary_size=tokenizer.vocabulary_size,
            continues=jnp.asarray(tokenizer.continues) if self.masking.whole_words else None,
        )

    @cached_property
    def _chosen_regions(self) -> Bool[Array, "batch regions"]:
        keys = example_keys(purpose_key(self.draws, "masked_regions"), self.batch["index"])
        maskable = self.batch["region_mask"] & self.batch["valid"][:, None]
        return choose(maskable, keys, self.masking.regions)

    @cached_property
    def _chosen_patches(self) -> Bool[Array, "batch patches"]:
        keys = example_keys(purpose_key(self.draws, "masked_patches"), self.batch["index"])
        chosen = choose_blocks(keys, self.model.config.image.grid, self.masking.patches)
        return chosen & self.batch["valid"][:, None]

    @cached_property
    def _masked_image(self) -> Encoded:
        """The picture, encoded, some of it hidden: patches where a model hides them, or regions.

        They are hidden by the model's own token, or regions as zeros. A model that hides neither
        sees the whole picture.
        """
        parameters = inspect.signature(self.model.encode_image).parameters
        if "patch_mask" in parameters and "image_codes" in self.batch:
            return self.encode_image("masked patches", patch_mask=self._chosen_patches)
        if "regions" not in parameters or "regions" not in self.batch:
            return self.image
        chosen = self._chosen_regions
        regions = jnp.where(chosen[..., None], 0, self.batch["regions"])
        return self.encode_image("masked regions", regions=regions, region_masked=chosen)

    @cached_property
    def _masked_reading(self) -> Encoded:
        return self.encode_text("masked text", text=self._masked_text[0])

    @cached_property
    def _masked_fusion(self) -> Fused:
        return self.fuse(self._masked_image, self._masked_reading, "masked fusion")

    def _call(self, encode: Callable[..., Encoded], purpose: str, changes: dict[str, Any]) -> Any:
        given = {**self.batch, **self.shifts, **changes}
        with last_layers() as self._stacks[purpose]:
            return encode(**taken(encode, given), key=self.dropout_key(purpose))
