"""Which backend a program is made for: jax's own, or one that is only planned for."""

from contextlib import AbstractContextManager

import jax

# A context that jax knows of: what was traced for one backend is not reused for another.
_assumed = jax.make_user_context(None)


def current() -> str:
    """'cpu', 'gpu' or 'tpu': what implementations are chosen by."""
    return _assumed.value or jax.default_backend()


def assume(platform: str) -> AbstractContextManager[None]:
    """Within this context programs are made for `platform`, wherever they are traced."""
    return _assumed(platform)
