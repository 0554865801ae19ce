"""Which words, regions and patches are hidden where they are to be guessed.

What is hidden is drawn by example, so that it depends neither on the row nor on the devices.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

PROPOSALS = 32  # of blocks to hide of a picture: enough to hide the share that is asked for


@dataclass(frozen=True)
class Masking:
    """Shares of what is hidden: `config.masking`."""

    words: float = 0.15
    whole_words: bool = False  # all pieces of a word, or none (ViLT, section 3.3)
    regions: float = 0.15
    patches: float = 0.4  # in blocks
    # Hide words or regions, each in a pass of its own (UNITER, section 3.2); false: both at once
    # (LXMERT, VL-BERT, FLAVA).
    conditional: bool = True


def choose(
    maskable: Bool[Array, "batch length"], keys: Key[Array, " batch"], rate: float
) -> Bool[Array, "batch length"]:
    """Each of the `maskable` with probability `rate`, each row drawn from its own key."""
    uniform = jax.vmap(lambda key: jax.random.uniform(key, maskable.shape[1:]))(keys)
    return maskable & (uniform < rate)


def choose_blocks(
    keys: Key[Array, " batch"], grid: tuple[int, int], rate: float
) -> Bool[Array, "batch patches"]:
    """A share of up to `rate` of each picture's patches, row by row of the grid, in blocks."""
    draw = jax.vmap(lambda key: jax.random.uniform(key, (PROPOSALS, 4)))
    count = round(rate * grid[0] * grid[1])
    blocks = jax.vmap(lambda uniform: blocks_of(uniform, grid, count))(draw(keys))
    return blocks.reshape(len(keys), -1)


def blocks_of(
    uniform: Float[Array, "proposals 4"], grid: tuple[int, int], count: int
) -> Bool[Array, "height width"]:
    """Rectangles that cover up to `count` patches (Bao et al. 2022, BEiT, algorithm 1).

    Each row of numbers in [0, 1) proposes a block: its area, 16 patches or what is left to hide up
    to all that is left; its height by its width, between 0.3 and 1/0.3; and its place. It is taken
    where it fits the grid and hides no more than is left: `count` is never exceeded, as in BEiT's
    and FLAVA's code, and mostly reached.
    """
    height, width = grid
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)

    def propose(mask, numbers):
        left = count - mask.sum()
        least = jnp.minimum(16, left)
        area = least + numbers[0] * (left - least)
        ratio = jnp.exp((2 * numbers[1] - 1) * -jnp.log(0.3))
        down, across = jnp.round(jnp.sqrt(area * ratio)), jnp.round(jnp.sqrt(area / ratio))
        top = jnp.floor(numbers[2] * (height - down + 1))
        start = jnp.floor(numbers[3] * (width - across + 1))
        inside = (rows >= top) & (rows < top + down)
        inside &= (columns >= start) & (columns < start + across)
        fits = (down <= height) & (across <= width) & ((inside & ~mask).sum() <= left)
        return mask | (inside & fits), None

    return jax.lax.scan(propose, jnp.zeros(grid, bool), uniform)[0]


def mask_tokens(
    text: Int[Array, "batch length"],
    maskable: Bool[Array, "batch length"],
    keys: Key[Array, " batch"],
    *,
    rate: float,
    mask_id: int,
    vocabulary_size: int,
    continues: Bool[Array, " words"] | None = None,
) -> tuple[Int[Array, "batch length"], Bool[Array, "batch length"]]:
    """BERT's corruption (Devlin et al. 2019, section 3.1), each row drawn from its own key.

    A token is chosen with probability `rate`; of the chosen, 80 % become [MASK], 10 % a word drawn
    evenly from the vocabulary, 10 % stay. `continues` says of each id whether it goes on with the
    word before it ('##…'): given that, whole words are chosen. Returns the new text and where it
    was chosen.
    """

    def row(row_text, row_maskable, key):
        choose_key, kind, word = jax.random.split(key, 3)
        places = jnp.arange(len(row_text))
        if continues is not None:
            # A piece shares the draw of the place where its word begins.
            starts = jnp.where(continues[row_text], 0, places)
            places = jax.lax.associative_scan(jnp.maximum, starts)
        uniform = jax.random.uniform(choose_key, row_text.shape)[places]
        chosen = row_maskable & (uniform < rate)
        u = jax.random.uniform(kind, row_text.shape)
        words = jax.random.randint(word, row_text.shape, 0, vocabulary_size, row_text.dtype)
        corrupted = jnp.where(u < 0.8, mask_id, jnp.where(u < 0.9, words, row_text))
        return jnp.where(chosen, corrupted, row_text), chosen

    return jax.vmap(row)(text, maskable, keys)
