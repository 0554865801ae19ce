"""What train.py and eval.py share: flags, and errors that people can act on."""

import hashlib
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import absl.logging
import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from mmjax import distributed
from mmjax.errors import InputError, near_misses

HERE = Path(__file__).resolve().parent


def run(main: Callable[[ConfigDict], Any]) -> None:
    """Parse the flags and call `main` with the config.

    The config is the recipe named by --config=FILE.py (FILE.py:ARG passes ARG to its get_config),
    overridden by --config.KEY=VALUE, locked. Bad input ends in its message and exit status 2.
    """
    config = config_flags.DEFINE_config_file(
        "config", None, "The recipe, a file in configs/; --config.KEY=VALUE overrides."
    )
    flags.mark_flag_as_required("config")
    distributed.define_flags()

    def guarded(arguments: Sequence[str]) -> None:
        if len(arguments) > 1:
            _exit(f"unexpected argument {arguments[1]!r}: flags are written --name=value.")
        with distributed.ending_together():
            try:
                distributed.join_if_asked()
                try:
                    config.value.keys()  # of a file that was not found, the first access tells
                except OSError as error:
                    _exit(_unreadable(sys.argv, error))
                distributed.require_agreement(_started_with(config.value))
                main(config.value)
            except InputError as error:
                _exit(str(error))

    absl.logging.use_absl_handler()
    absl.logging.set_verbosity(absl.logging.INFO)
    handler = absl.logging.get_absl_handler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    handler.addFilter(_is_ours_or_serious)
    app.run(guarded, flags_parser=_parse)


def _started_with(config: ConfigDict) -> dict[str, Any]:
    """What every process of a run must have alike: the config, the program's flags, the code."""
    keys = {
        f"config.{jax.tree_util.keystr(path, simple=True, separator='.')}": value
        for path, value in jax.tree.leaves_with_path(config.to_dict(), is_leaf=lambda x: x is None)
    }
    own = flags.FLAGS.get_key_flags_for_module(sys.argv[0])  # --workdir and the like
    code = hashlib.sha256()
    for file in sorted(HERE.rglob("*.py")):
        code.update(file.read_bytes())
    return {
        **keys,
        **{f"--{flag.name}": flag.value for flag in own},
        "the code of mmjax": code.hexdigest()[:12],
        "the version of jax": jax.__version__,
    }


def _is_ours_or_serious(record: logging.LogRecord) -> bool:
    """Libraries tell of every file they write; people want the run's own words and warnings."""
    path = Path(record.pathname).resolve()
    if path.parent == HERE.parent or path.is_relative_to(HERE):
        return True
    # Orbax calls waiting for its own threads a warning.
    return record.levelno >= (logging.ERROR if "orbax" in path.parts else logging.WARNING)


def _parse(arguments: Sequence[str]) -> list[str]:  # type: ignore[return]
    try:
        return flags.FLAGS(list(arguments), known_only=False)
    except flags.Error as error:
        told = _by_recipe(error)
        _exit(str(told) if told else f"{error}\nSee --help.")
    except InputError as error:  # raised by a recipe
        _exit(str(error))
    except (AttributeError, KeyError) as error:
        if (message := _unknown_key(arguments, error)) is None:
            raise  # a mistake inside the recipe: its author needs the traceback
        _exit(message)
    except (TypeError, ValueError) as error:
        _exit(f"a --config override does not fit: {error}")
    except OSError as error:
        _exit(_unreadable(arguments, error))


def _by_recipe(error: BaseException | None) -> InputError | None:
    """What a recipe raised, below the errors that flags make of it."""
    found = None
    while error is not None:
        found = error if isinstance(error, InputError) else found
        error = error.__cause__ or error.__context__
    return found


def _unreadable(arguments: Sequence[str], error: OSError) -> str:
    """The recipe that is not there, and what lies beside it under such a name."""
    named = [a.partition("=")[2] for a in arguments if a.lstrip("-").startswith("config=")]
    path = Path(named[0].partition(":")[0]) if named else Path()
    if not named or path.exists():
        return f"--config: {error}"
    beside = [file.name for file in path.parent.glob("*.py")]
    return f"--config: there is no file {path}.{near_misses(path.name, beside)}"


def _unknown_key(arguments: Sequence[str], error: BaseException) -> str | None:
    """The override that named a key the recipe has not, and what ml_collections suggests."""
    text = str(error).replace("\\n", "\n").strip("'\"")
    key, _, hint = text.partition("\n")
    key = key.strip("'\"\\")
    overrides = [a.split("=")[0].lstrip("-") for a in arguments if a.startswith("--config.")]
    full = next((name for name in overrides if key in name.split(".")), None)
    if full is None:
        return None
    return f"{full} is no key of the config. {hint.strip()} Every key: mmjax/config.py.".replace(
        "  ", " "
    )


def _exit(message: str) -> Any:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
