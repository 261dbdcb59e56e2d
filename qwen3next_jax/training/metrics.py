"""What a run reports: files of lines, TensorBoard's event files, and a line on the terminal.

`metrics.jsonl` and `samples.jsonl` hold one JSON object a line, whose first key is `step`. When a
run is resumed from a checkpoint, the lines of later steps are removed. Most metrics are numbers; a
metric with a value for each layer is a list, with null for layers to which it does not apply. JSON
has no non-finite numbers; they are written as the strings "nan", "inf" and "-inf", which `float`
reads.
"""

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
import tensorboardX
import tqdm


def reporters(
    workdir: str | pathlib.Path, num_steps: int, *, start_step: int
) -> "tuple[MetricWriter | Silent, Progress | Silent]":
    """What reports a run that begins after `start_step`: in process 0; the others are silent."""
    if jax.process_index() > 0:
        return Silent(), Silent()
    writer = MetricWriter(workdir, start_step=start_step)
    return writer, Progress(num_steps, start_step=start_step)


class Silent:
    """A `MetricWriter` and a `Progress` that say nothing."""

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes nothing."""

    def write_samples(self, step: int, samples: Iterable[Mapping[str, Any]]) -> None:
        """Writes nothing."""

    def update(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        """Shows nothing."""

    def close(self) -> None:
        """Has nothing to close."""


class MetricWriter:
    """Appends to `metrics.jsonl`, `samples.jsonl` and `tensorboard/`; one a run, in process 0."""

    def __init__(self, workdir: str | pathlib.Path, *, start_step: int = 0):
        """Opens the files of a work directory.

        Args:
          workdir: is made where needed.
          start_step: the step that the run goes on from: later lines are cut off, and with them
            what is not JSON, such as the half line of a killed run.
        """
        workdir = pathlib.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        self._lines = _open_cut_back(workdir / "metrics.jsonl", start_step)
        self._samples = _open_cut_back(workdir / "samples.jsonl", start_step)
        # TensorBoard's files can't be cut; a mark in them hides what was written of later steps.
        # Their names hold the second they were opened, too coarse to tell two courses apart.
        first = start_step + 1
        self._events = tensorboardX.SummaryWriter(
            str(workdir / "tensorboard"), purge_step=first, filename_suffix=f".{first}"
        )

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Adds a line and flushes it.

        Args:
          step: the number of updates made.
          metrics: numbers, arrays of one, or lists; TensorBoard gets a list's numbers one by one,
            as NAME/0, NAME/1, ...
        """
        values = {name: _on_host(value) for name, value in metrics.items()}
        _add_line(self._lines, step, values)
        for name, value in values.items():
            numbers = {f"{name}/{i}": x for i, x in enumerate(value)} if _is_list(value) else {}
            for name_, x in (numbers or {name: value}).items():
                if isinstance(x, int | float):
                    self._events.add_scalar(name_, x, step)

    def write_samples(self, step: int, samples: Iterable[Mapping[str, Any]]) -> None:
        """Adds a line for each sample of text: its `prompt` and `text`, after `step` updates."""
        for sample in samples:
            _add_line(self._samples, step, sample)

    def close(self) -> None:
        """Closes the files."""
        self._lines.close()
        self._samples.close()
        self._events.close()


class Progress:
    """Loss, speed and time left: a bar on a terminal; elsewhere a plain line each time."""

    def __init__(self, num_steps: int, *, start_step: int = 0):
        """Shows `start_step` of `num_steps`."""
        self._num_steps = num_steps
        self._first: tuple[int, float] | None = None  # the first update, which compilation precedes
        self._bar = (
            tqdm.tqdm(total=num_steps, initial=start_step, unit="step", dynamic_ncols=True)
            if sys.stderr.isatty()
            else None
        )

    def update(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        """Shows where the run is, after `step` updates."""
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
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def has_line(path: pathlib.Path, step: int, name: str) -> bool:
    """Whether a file of lines has one of this step that holds a value of this name."""
    lines = path.read_text().splitlines() if path.exists() else []
    return any(_step(line) == step and name in json.loads(line) for line in lines)


def _open_cut_back(path: pathlib.Path, last_step: int) -> TextIO:
    """Opens a file behind its lines of steps up to `last_step`; later ones are cut off.

    A kill leaves the old file or the new one.
    """
    if not path.exists():
        return path.open("a")
    kept = [line for line in path.read_text().splitlines() if _step(line) <= last_step]
    beside = path.with_suffix(".tmp")
    with beside.open("w") as file:
        file.writelines(line + "\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    return path.open("a")


def _add_line(file: TextIO, step: int, values: Mapping[str, Any]) -> None:
    line = {"step": int(step)} | {name: _as_json(value) for name, value in values.items()}
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
