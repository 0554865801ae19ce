"""What a model offers to generate texts, and what is generated."""

from typing import Any, NamedTuple, Protocol, Self

from jaxtyping import Array, Float, Int


class Memory(Protocol):
    """What a decoder keeps of the tokens it has seen, and of what the texts are about.

    `mmjax.decoding.cache` has one for stacks of `Block`s.
    """

    def repeated(self, beams: int) -> Self:
        """`beams` rows of text in succession for each that there is."""
        ...

    def reordered(self, beams: Int[Array, "batch beams"]) -> Self:
        """The rows of every example picked anew, by their number among its beams."""
        ...


class Decoder(Protocol):
    """A model that writes a text from left to right, all rows of a batch in step."""

    @property
    def max_length(self) -> int:
        """The longest text it has positions for."""
        ...

    def start(self, padding: Int[Array, " batch"], length: int, **inputs: Any) -> Memory:
        """The memory before the first token of texts of at most `length` about `inputs`.

        `padding` is how many tokens on the left of each text are none.
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
