"""How tokens look at one another in a model's last layers: for looking at, or to distil from.

    with last_layers() as stacks:
        encoded = model.encode_image(image)
    maps = stacks[-1]()  # of the last layer of the last stack that ran

A model that runs keeps only what entered the last layer of each of its stacks. From that the
attention is computed again when it is asked for; what nobody asks for is compiled away.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


@dataclass(frozen=True)
class SelfAttention:
    """How every token of a sequence looks at all of them, in one layer."""

    scores: Float[Array, "batch heads tokens tokens"]  # before the mask and the softmax
    mask: Bool[Array, "#batch _ tokens"] | None  # true where a token may look; None: everywhere

    @property
    def visible(self) -> Bool[Array, "#batch tokens tokens"]:
        """The mask with a row for every token."""
        tokens = self.scores.shape[-1]
        mask = jnp.ones((1, 1, tokens), bool) if self.mask is None else jnp.asarray(self.mask, bool)
        return jnp.broadcast_to(mask, (mask.shape[0], tokens, tokens))


LastLayer = Callable[[], list[SelfAttention]]  # its self-attentions, in the order of their calls

_stacks: ContextVar[list[LastLayer] | None] = ContextVar("stacks", default=None)
_attentions: ContextVar[list[SelfAttention] | None] = ContextVar("attentions", default=None)


@contextmanager
def last_layers() -> Iterator[list[LastLayer]]:
    """The last layer of every stack that runs within, in their order."""
    stacks: list[LastLayer] = []
    token = _stacks.set(stacks)
    try:
        yield stacks
    finally:
        _stacks.reset(token)


def note_last_layer(run_again: Callable[[], object]) -> None:
    """A stack has run; `run_again` repeats its last layer. For `mmjax.layers.Stack`."""
    if (stacks := _stacks.get()) is not None:
        stacks.append(lambda: _attentions_of(run_again))


def note_self_attention(describe: Callable[[], SelfAttention]) -> None:
    """A sequence has looked at itself. For `mmjax.layers.Attention`."""
    if (attentions := _attentions.get()) is not None:
        attentions.append(describe())


def _attentions_of(run: Callable[[], object]) -> list[SelfAttention]:
    attentions: list[SelfAttention] = []
    token = _attentions.set(attentions)
    try:
        run()
    finally:
        _attentions.reset(token)
    return attentions
