"""What the command lines have in common: how errors are told, and where and how files are kept."""

import contextlib
import os
import pathlib
import sys
import traceback
from collections.abc import Iterator
from typing import Any

_PACKAGE = pathlib.Path(__file__).parent


@contextlib.contextmanager
def told_errors(after: str = "") -> Iterator[None]:
    """Ends with an error's message alone where our own code, or the machine, raised it on purpose.

    Such a message says what was given and a way out, or what the disk lacks, which a traceback
    would bury. Of any other error the traceback is what helps.

    Args:
      after: what to say behind it, of what was or was not done.
    """
    try:
        yield
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        # One of ours may come from another process, with the traceback of that left behind.
        told = isinstance(error, OSError) or type(error).__module__.startswith(_PACKAGE.name)
        if not told and not is_ours(traceback.extract_tb(error.__traceback__)[-1]):
            raise
        sys.exit(f"error: {error}" + (f"\n{after}" if after else ""))


def is_ours(frame: traceback.FrameSummary) -> bool:
    """Whether this is a `raise` in the package, a command's file or a config beside it."""
    file, root = pathlib.Path(frame.filename), _PACKAGE.parent
    places = (_PACKAGE, root / "train.py", root / "eval.py", root / "configs")
    return any(map(file.is_relative_to, places)) and (frame.line or "").startswith("raise ")


def cache_folder() -> pathlib.Path:
    """Where what can be made again is kept: `$XDG_CACHE_HOME/qwen3next_jax`, or in `~/.cache`."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return pathlib.Path(cache, "qwen3next_jax")


def keep_compiled_programs() -> None:
    """Lets JAX keep what it compiles for the next time, where the environment names no folder."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))


def write_whole(path: Any, content: str | bytes) -> None:
    """Writes a file that appears whole or not at all.

    Args:
      path: a pathlib.Path, or an epath.Path that may lie in the cloud.
      content: text is written as UTF-8.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.parent / f".{path.name}.{os.getpid()}"
    unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
    unfinished.replace(path)
