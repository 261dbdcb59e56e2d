"""What the commands share: error messages without tracebacks, caches, and atomic writing."""

import contextlib
import io
import os
import pathlib
import secrets
import sys
import tempfile
import traceback
from collections.abc import Iterator
from typing import Any

_PACKAGE = pathlib.Path(__file__).parent


@contextlib.contextmanager
def told_errors(after: str = "") -> Iterator[None]:
    """Exits with an expected error's message alone, and lets any other error keep its traceback.

    Expected are an OSError (such as a full disk) and what a `raise` statement in our own code
    raised: their messages say what is wrong and what to do, which a traceback would bury.

    What the terminal's encoding cannot show is printed as "?".

    Args:
      after: a line to print behind the message, such as what was or was not done.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        yield
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        # Classes of ours are told by their name too: from a worker process they come without the
        # traceback that would show where they were raised.
        told = isinstance(error, OSError) or type(error).__module__.startswith(_PACKAGE.name)
        if not told and not is_ours(traceback.extract_tb(error.__traceback__)[-1]):
            raise
        sys.exit(f"error: {error}" + (f"\n{after}" if after else ""))


@contextlib.contextmanager
def known_keys() -> Iterator[None]:
    """Tells a --config.KEY that no config has without the traceback of ml_collections."""
    try:
        yield
    except (AttributeError, KeyError) as error:  # it names the nearest key
        frames = traceback.extract_tb(error.__traceback__)
        if "ml_collections" not in frames[-1].filename or "get_config" in [f.name for f in frames]:
            raise  # a mistake in a config file
        named = str(error).strip("\"'").replace("\\n", " ").replace("\\'", "'")
        sys.exit(f"error: The config has no key {named}\nconfigs/tiny.py shows all of them")


def is_ours(frame: traceback.FrameSummary) -> bool:
    """Whether a frame is a `raise` statement in the package, train.py, eval.py or configs/."""
    file, root = pathlib.Path(frame.filename), _PACKAGE.parent
    places = (_PACKAGE, root / "train.py", root / "eval.py", root / "configs")
    return any(map(file.is_relative_to, places)) and (frame.line or "").startswith("raise ")


def cache_folder() -> pathlib.Path:
    """The folder of caches: `$XDG_CACHE_HOME/qwen3next_jax`, by default in `~/.cache`."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return pathlib.Path(cache, "qwen3next_jax")


def keep_compiled_programs() -> None:
    """Turns on JAX's cache of compiled programs, unless the environment has set its folder."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))


def check_writable(path: pathlib.Path) -> None:
    """Raises the OSError that `write_whole` would, while there is nothing to lose yet."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; name a file inside it")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def write_whole(path: Any, content: str | bytes) -> None:
    """Writes a file that appears whole or not at all.

    Args:
      path: a pathlib.Path, or an epath.Path that may lie in the cloud.
      content: text is written as UTF-8.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = unfinished(path)
    beside.write_bytes(content.encode() if isinstance(content, str) else content)
    beside.replace(path)


def unfinished(path: Any) -> Any:
    """A hidden name beside a path, of its type, for what takes its place once it is whole.

    Nobody else has it. The process's number would not do: processes in containers have the same,
    those of other machines on one disk and those that were killed.
    """
    return path.parent / f".{path.name}.partial-{secrets.token_hex(4)}"
