"""What a model offers to generate texts, and what is generated."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int


class Memory(Protocol):
    """What a decoder keeps of the tokens it has seen, and of what the texts are about.

    `mmjax.decoding.cache` has one for stacks of `Block`s.
    """

    def repeated(self, beams: int) -> "Memory":
        """`beams` rows of text in succession for each that there is."""
        ...

    def reordered(self, beams: Int[Array, "batch beams"]) -> "Memory":
        """The rows of every example picked anew, by their number among its beams."""
        ...


@runtime_checkable
class Decoder(Protocol):
    """A model, an `nnx.Module`, that writes texts from left to right, all rows in step."""

    @property
    def max_length(self) -> int:
        """The longest text it has positions for."""
        ...

    @property
    def start(self) -> Callable[..., Any]:
        """`start(padding, length, **inputs)`, the memory before the first token.

        The texts have at most `length` tokens, of which `padding [B]` on the left are none, and are
        about the `inputs`.
        """
        ...

    def step(
        self, tokens: Int[Array, "rows tokens"], memory: Any, at: int | Int[Array, ""]
    ) -> tuple[Float[Array, "rows words"], Any]:
        """Scores of the token behind the last one given, and the memory of these as well.

        The tokens stand from column `at` on; those before have been given.
        """
        ...


class Generated(NamedTuple):
    """Texts with their prompts, and how likely they are.

    The score is the sum of the logarithms of the new tokens' probabilities; of a text found by beam
    search that is divided by their number to the power of `length_penalty`.
    """

    tokens: Int[Array, "batch length"]
    scores: Float[Array, " batch"]
