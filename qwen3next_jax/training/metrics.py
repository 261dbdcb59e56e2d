"""Metrics of a run: JSON lines, TensorBoard's event files, and progress on the terminal.

`metrics.jsonl` and `samples.jsonl` hold one JSON object a line, whose first key is `step`. When a
run is resumed from a checkpoint, the lines of later steps are removed. Most metrics are numbers; a
metric with a value for each layer is a list, with null for layers to which it does not apply. JSON
has no non-finite numbers; they are written as the strings "nan", "inf" and "-inf", which `float`
parses.
"""

import contextlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

import jax
import numpy as np
import tqdm
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from qwen3next_jax.command import naming, replacing


def reporters(
    workdir: str | pathlib.Path, num_steps: int, *, start_step: int
) -> "tuple[MetricWriter | Silent, Progress | Silent]":
    """The writer and progress of a run that starts after `start_step`; silent but in process 0."""
    if jax.process_index() > 0:
        return Silent(), Silent()
    writer = MetricWriter(workdir, start_step=start_step)
    return writer, Progress(num_steps, start_step=start_step)


class Silent:
    """A `MetricWriter` and a `Progress` that do nothing."""

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes nothing."""

    def write_samples(self, step: int, samples: Iterable[Mapping[str, Any]]) -> None:
        """Writes nothing."""

    def update(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        """Shows nothing."""

    def close(self) -> None:
        """Has nothing to close."""


class MetricWriter:
    """Appends to `metrics.jsonl`, `samples.jsonl` and `tensorboard/`; one process has it."""

    def __init__(self, workdir: str | pathlib.Path, *, start_step: int = 0):
        """Opens the files of a work directory.

        Args:
          workdir: the run's directory, created if needed.
          start_step: step that the run resumes from. Lines of later steps are removed, and lines
            that are not JSON, such as an incomplete one of a killed run.
        """
        workdir = pathlib.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        self._lines = _open_truncated(workdir / "metrics.jsonl", start_step)
        self._samples = _open_truncated(workdir / "samples.jsonl", start_step)
        self._tensorboard = workdir / "tensorboard"
        self._tensorboard.mkdir(exist_ok=True)
        # Not by `SummaryWriter`, which writes in a thread: what that has not written yet would be
        # lost by a kill, and once the disk is full it waits forever.
        # The suffix is needed because two files opened in the same second would share a name.
        first = start_step + 1
        with naming(self._tensorboard):
            self._events = EventsWriter(str(self._tensorboard / "events"), f".{first}")
            # The files can't be truncated; a start hides what they have of later steps.
            start = SessionLog(status=SessionLog.START)
            self._add_event(first, session_log=start)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Adds a line and flushes it.

        Args:
          step: number of updates made.
          metrics: numbers, arrays of one number, or lists; TensorBoard gets the numbers of a list
            as NAME/0, NAME/1, ...
        """
        values = {name: _on_host(value) for name, value in metrics.items()}
        _add_line(self._lines, step, values)
        with naming(self._tensorboard):
            for name, value in values.items():
                numbers = {f"{name}/{i}": x for i, x in enumerate(value)} if _is_list(value) else {}
                for name_, x in (numbers or {name: value}).items():
                    if isinstance(x, int | float):
                        self._add_event(step, summary=scalar(name_, x))
            self._events.flush()

    def write_samples(self, step: int, samples: Iterable[Mapping[str, Any]]) -> None:
        """Adds a line for each sample of text: its `prompt` and `text`, after `step` updates."""
        for sample in samples:
            _add_line(self._samples, step, sample)

    def close(self) -> None:
        """Closes the files."""
        files = (
            (self._lines, self._lines.name),
            (self._samples, self._samples.name),
            (self._events, self._tensorboard),
        )
        with contextlib.ExitStack() as stack:
            for file, path in files:
                stack.enter_context(naming(path))
                stack.enter_context(contextlib.closing(file))

    def _add_event(self, step: int, **content: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **content))


class Progress:
    """Loss, speed and time left: a bar on a terminal, otherwise a line for each update."""

    def __init__(self, num_steps: int, *, start_step: int = 0):
        """Starts at `start_step` of `num_steps`."""
        self._num_steps = num_steps
        self._first: tuple[int, float] | None = None  # of the first update, after compilation
        self._bar = (
            tqdm.tqdm(total=num_steps, initial=start_step, unit="step", dynamic_ncols=True)
            if sys.stderr.isatty()
            else None
        )

    def update(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        """Shows the progress after `step` updates."""
        loss_text = f"loss {loss:.4f}"
        speed = f"{tokens_per_second:,.0f} tokens/s" if tokens_per_second else "compiled"
        if self._bar is not None:
            self._bar.set_postfix_str(f"{loss_text}, {speed}", refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        first, start = self._first = self._first or (step, now)
        line = f"step {step}/{self._num_steps}  {loss_text}  {speed}"
        if step > first:
            left = (now - start) / (step - first) * (self._num_steps - step)
            line += f"  {tqdm.tqdm.format_interval(left)} left"
        print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Closes the bar and leaves it on the screen."""
        if self._bar is not None:
            self._bar.close()


def names_at(path: pathlib.Path, step: int) -> set[str]:
    """The names of all values of a step in a file of JSON lines; of none if there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {name for line in lines if _step(line) == step for name in json.loads(line)}


def _open_truncated(path: pathlib.Path, last_step: int) -> TextIO:
    """Removes the lines of steps after `last_step`, and opens the file for appending.

    The file is replaced atomically: a kill leaves the old file or the new one.
    """
    if not path.exists():
        return path.open("a")
    kept = [line for line in path.read_text().splitlines() if _step(line) <= last_step]
    with replacing(path) as partial, naming(path), partial.open("w") as file:
        file.writelines(line + "\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    return path.open("a")


def _add_line(file: TextIO, step: int, values: Mapping[str, Any]) -> None:
    line = {"step": int(step)} | {name: _as_json(value) for name, value in values.items()}
    with naming(file.name):
        file.write(json.dumps(line, allow_nan=False) + "\n")
        file.flush()


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf  # never kept


def _on_host(value: Any) -> Any:
    return value if _is_list(value) else np.asarray(value).item()


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _as_json(value: Any) -> Any:
    if _is_list(value):
        return [_as_json(x) for x in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
