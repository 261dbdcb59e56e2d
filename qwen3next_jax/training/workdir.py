"""A run's work directory: its lock, its config, and what an earlier start left in it."""

import contextlib
import json
import pathlib
from collections.abc import Iterator

import jax
from absl import logging

from qwen3next_jax.command import write_atomic
from qwen3next_jax.config import RunConfig, read_json
from qwen3next_jax.data.tokenizer import TOKENIZER_FILES
from qwen3next_jax.parallel.processes import exchange, require_shared

_DECIDE_THE_TOKENIZER = (  # keys of `data`
    "source", "path", "field", "split", "mixture", "tokenizer", "chat_template",
    "holdout_fraction", "on_error",
)  # fmt: skip


@contextlib.contextmanager
def workdir_lock(workdir: pathlib.Path) -> Iterator[None]:
    """Locks a work directory, since two runs in one would delete each other's files.

    Creates the directory if needed. The lock ends with the process, even if that is killed.

    Raises:
      ValueError: in all processes, if another run holds the lock, or the directory holds files that
        are not a run's.
    """
    lock, problem = None, None
    if jax.process_index() == 0 and not (problem := _why_not_usable(workdir)):
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / "lock").open("w")
        try:
            import fcntl  # which Windows does not have

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            problem = (
                f"Another process is training in {workdir}; wait for it, stop it, or choose "
                "another --workdir"
            )
        except (ImportError, OSError) as error:
            logging.warning("%s cannot be locked (%s); start no other run in it", workdir, error)
    try:
        if problem := exchange(problem)[0]:
            raise ValueError(problem)
        # If the others do not see process 0's directory, `require_shared` will raise.
        workdir.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        if lock is not None:
            lock.close()


def _why_not_usable(workdir: pathlib.Path) -> str | None:
    """Why a run may not use a directory; None if it may."""
    path = workdir / "config.json"
    if workdir.exists() and not workdir.is_dir():
        return f"--workdir={workdir} is a file; name a directory"
    if not path.exists():
        if not has_steps(workdir):
            return None
        return (
            f"{workdir} holds checkpoints but no config.json, which says of what run; put it back, "
            "or choose another --workdir"
        )
    try:
        given = json.loads(path.read_text())
        if isinstance(given, dict) and {"model", "data", "train"} <= given.keys():
            return None
    except ValueError:  # not even JSON
        pass
    return f"{path} is not a run's, and would be written over; choose another --workdir"


def discard_unstarted_run(config: RunConfig, workdir: pathlib.Path) -> None:
    """Replaces a run that has saved no checkpoint by a run of this config.

    Call it before the data is loaded. It acts in process 0 only, and only if there is no
    checkpoint. It removes the tokenizer that an earlier start left if that was a copy, since the
    original may have changed, or if its texts or vocabulary differ; but not if the config names a
    file in that directory, which the user has put there. It writes the config, so that the next
    start can compare, however far this one gets.
    """
    if jax.process_index() or has_steps(workdir):
        return
    path = workdir / "config.json"
    named = [name for name in (config.data.tokenizer, config.data.chat_template) if name]
    own = any(pathlib.Path(name).resolve().is_relative_to(workdir.resolve()) for name in named)
    if path.exists() and not own:
        before, now = read_json(path), config.to_dict()
        differs = before["model"]["vocab_size"] != now["model"]["vocab_size"] or any(
            before["data"].get(key) != now["data"][key] for key in _DECIDE_THE_TOKENIZER
        )
        if named or differs:
            for name in TOKENIZER_FILES:
                (workdir / name).unlink(missing_ok=True)
    _write_config(config, path)


def has_steps(workdir: pathlib.Path) -> bool:
    """Whether a run has saved any checkpoint there, good or damaged."""
    return last_step(workdir) >= 0


def last_step(workdir: pathlib.Path) -> int:
    """The newest step that was saved there, good or damaged; -1 if there is none.

    It only lists the directory. `CheckpointStore.latest_step` counts the same steps, but needs an
    open store, which there is only for a directory that exists, and a call in every process.
    """
    names = (path.name for path in (workdir / "checkpoints").glob("*"))
    return max((int(name) for name in names if name.isdigit()), default=-1)


def keep_config(config: RunConfig, workdir: pathlib.Path) -> None:
    """Writes the config; if there are checkpoints, it may differ from theirs in a few keys only.

    Raises:
      ValueError: another key differs, or the processes do not share the directory.
    """
    path = workdir / "config.json"
    if jax.process_index() == 0:
        if has_steps(workdir):  # a run that has saved nothing may change any key
            config.check_resumable_from(read_json(path))
        _write_config(config, path)
    require_shared(workdir)


def _write_config(config: RunConfig, path: pathlib.Path) -> None:
    write_atomic(path, json.dumps(config.to_dict(), indent=2) + "\n")
