"""Shared by the commands: errors without tracebacks, caches, memory, atomic writing."""

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
def friendly_errors(after: str = "") -> Iterator[None]:
    """Exits with an expected error's message alone, and lets any other error keep its traceback.

    Expected errors are an OSError (such as a full disk) and whatever a `raise` statement in our own
    code raised: their messages say what is wrong and what to do, which a traceback would bury.

    Characters that the terminal's encoding lacks are printed as "?".

    Args:
      after: line to print after the message, such as "Nothing was written."
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        yield
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        # Our own exception classes are also recognised by their module: an error from a worker
        # process arrives without the traceback that would show where it was raised.
        expected = isinstance(error, OSError) or type(error).__module__.startswith(_PACKAGE.name)
        # A library's own words on what to install; Python's failed imports name a module.
        expected |= isinstance(error, ImportError) and error.name is None
        if not expected and not is_ours(traceback.extract_tb(error.__traceback__)[-1]):
            raise
        sys.exit(f"error: {error}" + (f"\n{after}" if after else ""))


@contextlib.contextmanager
def explain_unknown_key() -> Iterator[None]:
    """Exits with a message, without ml_collections' traceback, on an unknown --config.KEY."""
    try:
        yield
    except (AttributeError, KeyError) as error:  # ml_collections' message names the nearest key
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


def enable_compilation_cache() -> None:
    """Turns on JAX's cache of compiled programs, unless the environment has set its folder."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))


def use_huge_pages() -> None:
    """Makes the C library allocate large arrays on huge pages, unless the environment tunes it.

    Otherwise page faults take up to a fifth of a training step on a CPU. The C library reads its
    settings when a process starts, so this starts the process again: call it first. It does nothing
    on systems other than Linux.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def check_writable(path: pathlib.Path) -> None:
    """Raises the OSError that `write_atomic` would, before any work is done that could be lost."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; name a file inside it")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def write_atomic(path: Any, content: str | bytes) -> None:
    """Writes a file that appears whole or not at all.

    Args:
      path: a pathlib.Path, or an epath.Path that may lie in the cloud.
      content: text is written as UTF-8.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, naming(path):
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(path: Any) -> Iterator[Any]:
    """Yields a hidden path beside a file's; renames it to `path` on success, removes it on errors.

    Args:
      path: a pathlib.Path, or an epath.Path that may lie in the cloud; its folder exists.
    """
    partial = partial_path(path)
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def naming(path: Any) -> Iterator[None]:
    """Names the file in an OSError that names none, as that of a write to a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def partial_path(path: Any) -> Any:
    """A hidden, unused path beside `path`, of its type, to write to before renaming.

    Its suffix is random: a process id is not unique among containers, among machines that share a
    disk, or after a process was killed.
    """
    return path.parent / f".{path.name}.partial-{secrets.token_hex(4)}"
