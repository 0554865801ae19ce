"""What a user did that cannot work, told so that they can mend it."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: a config key, a file, a row, a checkpoint.

    The message names the thing, what was expected, what was found and what to do. The command
    lines print it without a traceback and exit with status 2.
    """


def near_misses(name: str, known: Iterable[str]) -> str:
    """A sentence that names the known names nearest to `name`: ' Did you mean …?', or all of them.

    >>> near_misses('batchsize', ['batch_size', 'seed'])
    ' Did you mean batch_size?'
    """
    known = sorted(map(str, known))
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if close:
        return f" Did you mean {' or '.join(close)}?"
    return f" Known are: {', '.join(known)}." if known else ""
