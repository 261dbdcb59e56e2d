"""What the command lines have in common: how errors are told, and where and how files are kept."""

import contextlib
import os
import pathlib
import sys
import traceback
from collections.abc import Iterator
from typing import Any

_OURS = pathlib.Path(__file__).parents[1]


@contextlib.contextmanager
def told_errors() -> Iterator[None]:
    """Ends with an error's message alone where our own code raised it, on purpose.

    Such a message says what was given and a way out, which a traceback would bury. Of any other
    error the traceback is what helps.
    """
    try:
        yield
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if not _is_ours(traceback.extract_tb(error.__traceback__)[-1]):
            raise
        sys.exit(f"error: {error}")


def _is_ours(frame: traceback.FrameSummary) -> bool:
    """Whether this is a `raise` of ours."""
    file = pathlib.Path(frame.filename)
    if not file.is_relative_to(_OURS) or "site-packages" in file.relative_to(_OURS).parts:
        return False
    return (frame.line or "").startswith("raise ")


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
