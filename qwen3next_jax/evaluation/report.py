"""One or several runs as a self-contained HTML file: no network, no server, no other file.

    python -m qwen3next_jax.evaluation.report DIR [DIR ...] [--output=FILE]

Training writes `report.html` into its work directory after each evaluation and checkpoint; the
command writes it again, or overlays several runs.

A curve keeps the lowest and the highest value of each span of steps, at their steps, so that a
spike of one step among 100,000 stays visible. A heat map keeps the means of spans. If there are too
many spans, pairs are merged: the size of a report and the memory to build it are bounded, however
long the run. When a `Report` is written again, it reads only the lines added since.

`report.html`, beside this file, is the page, which draws the data that this module selects.
"""

import argparse
import contextlib
import html
import json
import math
import pathlib
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

import numpy as np

from qwen3next_jax.command import check_writable, friendly_errors, write_atomic
from qwen3next_jax.config import FULL, LINEAR, ModelConfig, flatten, read_json

_CURVE_SPANS = 400  # in a curve; when there are more than twice as many, pairs are merged
_MAP_SPANS = 64  # in a heat map; when there are more than twice as many, pairs are merged
_SAMPLES = 12  # steps whose samples are shown, the first and the last among them
_COLORS = 8
_DASHES = ("", "6 3", "2 2", "8 3 2 3", "1 3")


class Panel(NamedTuple):
    """A chart or a heat map of the metrics whose whole names match `pattern`."""

    section: str
    title: str
    pattern: str
    log: bool = False
    note: str = ""


# A metric is shown in the first panel that it matches, or else in a panel of its own.
_CHARTS = (
    Panel("Loss", "Training loss", "loss|ce|mtp_ce", True,
          "loss: what is minimised; ce: nats a token, next token only; mtp_ce: tokens beyond"),
    Panel("Loss", "Router losses", "balance_loss|router_z_loss", False,
          "balance_loss: 1 when experts are evenly used; unscaled"),
    Panel("Evaluation", "Held-out cross-entropy", "eval_ce", False, "nats a token"),
    Panel("Evaluation", "Held-out bits per byte", "eval_bits_per_byte"),
    Panel("Evaluation", "Perplexity suite", "eval_perplexity_.*"),
    Panel("Evaluation", "Language-model tasks", "eval_lm_eval_.*"),
    Panel("Evaluation", "Speculation", "eval_speculation_.*"),
    Panel("Retrieval", "Long-context suite", "eval_long_context_.*"),
    Panel("Optimization", "Gradient norm", "grad_norm", True, "before clipping"),
    Panel("Optimization", "Learning rate", "learning_rate"),
    Panel("Optimization", "Update over weight", "update_ratio/.*", True,
          "norm of a step's update over the norm of the weights, by part of the model"),
    Panel("Throughput", "Tokens per second", "tokens_per_second", False,
          "padding not counted; evaluation and saving left out"),
    Panel("Throughput", "Waiting for data", "data_wait", False,
          "share of the steps' time spent waiting for the next batch"),
    Panel("Experts", "Busiest expert over the mean load", "expert_load_max", False,
          "of the worst layer; 1 when loads are even"),
    Panel("Experts", "Dropped assignments", "dropped_share", False,
          "share of the tokens' assignments to experts that were dropped"),
    Panel("Data", "Epochs", ".*/epoch", False, "how often each part's records were read"),
    Panel("Data", "Tokens by part", ".*/tokens"),
    Panel("Data", "Filled positions", "packing_efficiency", False, "share that hold a token"),
    Panel("Data", "Left out", "skipped_records|truncated_records|skipped_files"),
)  # fmt: skip
_MAPS = (
    Panel("Experts", "Busiest expert over the mean load, by layer", "layers/load_max", False,
          "1 when loads are even"),
    Panel("Experts", "Entropy of the loads", "layers/load_entropy", False,
          "over that of even loads: 1 when even"),
    Panel("Experts", "Entropy of the router", "layers/router_entropy", False,
          "mean over tokens, over that of a router without preference"),
    Panel("Layers", "Forgetting, mean of the heads", "layers/decay_mean", True,
          "nats a token: a head with 0.01 keeps 1/e of its state for 100 tokens"),
    Panel("Layers", "Forgetting, head that keeps longest", "layers/decay_min", True),
    Panel("Layers", "Forgetting, head that forgets fastest", "layers/decay_max", True),
    Panel("Layers", "Write strength β, mean of the heads", "layers/beta_mean"),
    Panel("Layers", "Write strength β, weakest head", "layers/beta_min"),
    Panel("Layers", "Write strength β, strongest head", "layers/beta_max"),
    Panel("Layers", "Openness of the output gate", "layers/output_gate", False,
          "mean of the sigmoid that multiplies attention's outputs"),
    Panel("Layers", "Openness of the shared expert's gate", "layers/shared_gate"),
    Panel("Layers", "Attention sink", "layers/attention_sink", False,
          "share of the attention that goes to the first token of a document"),
    Panel("Layers", "Largest activation", "layers/activation_max", True,
          "largest absolute entry of the hidden states after the layer"),
)  # fmt: skip
_SECTIONS = (
    "Loss", "Evaluation", "Retrieval", "Optimization", "Throughput", "Experts", "Layers", "Samples",
    "Data", "More", "Config", "Environment",
)  # fmt: skip
_UNSHOWN = {"step", "tokens", "dropped_assignments"}


class Curve:
    """One metric over the steps, reduced to the extremes of spans."""

    def __init__(self):
        self.last: tuple[int, float] | None = None
        self.not_finite = 0
        self._width = 1  # steps in a span
        self._spans: list[list[Any]] = []  # number, (step, lowest), (step, highest)

    def add(self, step: int, value: float) -> None:
        """Adds the value at a step; steps must not decrease."""
        if not math.isfinite(value):
            self.not_finite += 1
            return
        self.last = point = (step, value)
        span, spans = step // self._width, self._spans
        if spans and spans[-1][0] == span:
            if value < spans[-1][1][1]:
                spans[-1][1] = point
            if value > spans[-1][2][1]:
                spans[-1][2] = point
            return
        spans.append([span, point, point])
        if len(spans) > 2 * _CURVE_SPANS:
            self._width *= 2
            self._spans = []
            for _, low, high in spans:
                for kept in sorted({low, high}):
                    self.add(*kept)
            self.last = point

    def points(self) -> list[tuple[int, float]]:
        """The points that are kept, in the order of steps, including the last one."""
        ends = {self.last} if self.last else set()
        return sorted({point for _, low, high in self._spans for point in (low, high)} | ends)


class Map:
    """A metric with a value for each layer: means over spans of steps."""

    def __init__(self):
        self._width = 1
        self._spans: list[tuple[int, np.ndarray, np.ndarray]] = []  # number, sums, counts

    def add(self, step: int, values: Sequence[Any]) -> None:
        """Adds the layers' values at a step; None for layers that have none."""
        row = np.array(values, dtype=float)  # None becomes NaN
        known = np.isfinite(row)
        self._add(step // self._width, np.where(known, row, 0), known.astype(int))
        if len(self._spans) > 2 * _MAP_SPANS:
            self._width *= 2
            spans, self._spans = self._spans, []
            for number, sums, counts in spans:
                self._add(number // 2, sums, counts)

    def _add(self, number: int, sums: np.ndarray, counts: np.ndarray) -> None:
        if self._spans and self._spans[-1][0] == number:
            _, old_sums, old_counts = self._spans.pop()
            sums, counts = old_sums + sums, old_counts + counts
        self._spans.append((number, sums, counts))

    def columns(self) -> tuple[list[int], np.ndarray]:
        """The first step of each span, and means [layers, spans], NaN for spans without values."""
        sums, counts = (np.stack([span[i] for span in self._spans], axis=1) for i in (1, 2))
        with np.errstate(invalid="ignore"):
            return [span[0] * self._width for span in self._spans], sums / counts


class Run:
    """The contents of a work directory's files, which `read` reads incrementally."""

    def __init__(self, workdir: pathlib.Path):
        self.workdir, self.name = workdir, workdir.resolve().name
        self._forget()

    def _forget(self) -> None:
        self.curves: dict[str, Curve] = {}
        self.maps: dict[str, Map] = {}
        self.cells: tuple[int, list[Any]] | None = None  # the newest, with their step
        self.seconds: dict[str, float] = {}
        self.step, self._read_to = 0, 0

    def read(self) -> None:
        """Reads the lines added to metrics.jsonl, and all of the small files.

        Raises:
          FileNotFoundError: the directory is not a work directory.
        """
        path = self.workdir / "metrics.jsonl"
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; expected a work directory of train.py")
        if path.stat().st_size < self._read_to:  # truncated: the run resumed from a checkpoint
            self._forget()
        with path.open("rb") as file:
            file.seek(self._read_to)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # still being written
                self._read_to += len(line)
                with _damage_told(path, line):
                    self._add(json.loads(line))
        self.config = read_json(self.workdir / "config.json")
        self.starts = _lines_of(self.workdir / "environment.jsonl")
        self.samples = _lines_of(self.workdir / "samples.jsonl")

    def _add(self, line: dict[str, Any]) -> None:
        self.step = step = line.pop("step")
        for name, value in line.items():
            if name == "eval_long_context_cells":
                self.cells = (step, value)
            elif isinstance(value, list):
                self.maps.setdefault(name, Map()).add(step, value)
            elif name.startswith("seconds/"):
                what = name.removeprefix("seconds/")
                self.seconds[what] = self.seconds.get(what, 0.0) + value
            elif name == "tokens_per_second" and value == 0:
                pass  # the first step compiled; nothing was timed
            else:
                self.curves.setdefault(name, Curve()).add(step, float(value))

    def last(self, name: str) -> float | None:
        """The newest finite value of a metric."""
        curve = self.curves.get(name)
        return curve.last[1] if curve and curve.last else None


class Report:
    """The page of one run or of several."""

    def __init__(self, workdirs: Sequence[str | pathlib.Path], output: str | pathlib.Path):
        """Names the runs' work directories and the file to write; nothing is read yet."""
        self._runs = [Run(pathlib.Path(workdir)) for workdir in workdirs]
        self._output = pathlib.Path(output)
        if len({run.name for run in self._runs}) < len(self._runs):
            for run in self._runs:
                run.name = str(run.workdir)

    def write(self) -> None:
        """Reads what is new and replaces the page atomically."""
        for run in self._runs:
            run.read()
        page = resources.files("qwen3next_jax.evaluation").joinpath("report.html").read_text()
        title = "qwen3next_jax: " + ", ".join(run.name for run in self._runs)
        text = json.dumps(_page(self._runs, title), allow_nan=False, separators=(",", ":"))
        # JSON inside a script element must not contain the end tag: "<" is escaped.
        page = page.replace("<title>Report<", f"<title>{html.escape(title)}<")
        page = page.replace(">DATA<", ">" + text.replace("<", "\\u003c") + "<")
        write_atomic(self._output, page)


def _page(runs: list[Run], title: str) -> dict[str, Any]:
    sections: dict[str, list[dict[str, Any]]] = {name: [] for name in _SECTIONS}
    for panel, names in _panels(_CHARTS, (run.curves for run in runs), _unknown_chart):
        if series := _series(runs, names):
            sections[panel.section].append(
                {
                    "kind": "chart",
                    "title": panel.title,
                    "log": panel.log,
                    "series": series,
                    "note": "; ".join(filter(None, [panel.note, _not_finite(runs, names)])),
                }
            )
    for panel, names in _panels(_MAPS, (run.maps for run in runs), _unknown_map):
        for name in names:
            sections[panel.section] += _heat_maps(runs, name, panel)
    sections["Evaluation"] += _scores(runs)
    for run in runs:
        sections["Retrieval"] += _cells(run, several=len(runs) > 1)
        if sum(run.seconds.values()) > 0:
            sections["Throughput"].append({"kind": "time", "run": runs.index(run)})
        sections["Samples"] += _samples(run, several=len(runs) > 1)
    sections["Config"] += _compared(
        "Config", runs, [flatten(run.config) for run in runs], folded=len(runs) == 1
    )
    starts = [{**run.starts[-1], "starts": len(run.starts)} if run.starts else {} for run in runs]
    sections["Environment"] += _compared("Environment", runs, starts, folded=False)
    now = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    return {
        "title": title,
        "summary": _summary(runs),
        "sections": [{"title": name, "parts": parts} for name, parts in sections.items() if parts],
        "runs": [
            {"name": run.name, "seconds": sorted(run.seconds.items(), key=lambda s: -s[1])}
            for run in runs
        ],
        "footer": f"Written {now} UTC. A curve shows, of each span of steps, the lowest and the "
        "highest value; a heat map shows means.",
    }


def _panels(known: Iterable[Panel], metrics: Iterable[Mapping[str, Any]], unknown: Any):
    """The panels that have metrics to show, each with their names."""
    left = [name for name in dict.fromkeys(n for m in metrics for n in m) if name not in _UNSHOWN]
    for panel in known:
        names = [name for name in left if re.fullmatch(panel.pattern, name)]
        left = [name for name in left if name not in names]
        if names:
            yield panel, names
    for name in left:
        yield unknown(name), [name]


def _unknown_chart(name: str) -> Panel:
    return Panel("Evaluation" if name.startswith("eval_") else "More", name, name)


def _unknown_map(name: str) -> Panel:
    return Panel("Layers", name, name)


def _series(runs: list[Run], names: list[str]) -> list[dict[str, Any]]:
    """Curves: runs differ by color and metrics by dashes; in a single run, metrics by color."""
    series = []
    for r, run in enumerate(runs):
        for i, name in enumerate(names):
            points = run.curves[name].points() if name in run.curves else []
            if not points:
                continue
            color, dash = (r, i) if len(runs) > 1 else (i, i // _COLORS)
            series.append(
                {
                    "label": _label(run, name, several_runs=len(runs) > 1, alone=len(names) == 1),
                    "color": color % _COLORS,
                    "dash": _DASHES[dash % len(_DASHES)],
                    "x": [step for step, _ in points],
                    "y": [_short(value) for _, value in points],
                }
            )
    return series


def _label(run: Run, name: str, *, several_runs: bool, alone: bool) -> str:
    if not several_runs:
        return name
    return run.name if alone else f"{run.name}: {name}"


def _not_finite(runs: list[Run], names: list[str]) -> str:
    count = sum(run.curves[name].not_finite for run in runs for name in names if name in run.curves)
    return f"{count} values are not finite and left out" if count else ""


def _heat_maps(runs: list[Run], name: str, panel: Panel) -> list[dict[str, Any]]:
    """A heat map for each run, all on the same scale; layers without values are left out."""
    columns_of = [(run, *run.maps[name].columns()) for run in runs if name in run.maps]
    columns_of = [entry for entry in columns_of if np.isfinite(entry[2]).any()]
    if not columns_of:
        return []
    low = min(np.nanmin(values) for *_, values in columns_of)
    high = max(np.nanmax(values) for *_, values in columns_of)
    maps = []
    for run, columns, values in columns_of:
        rows = [i for i, row in enumerate(values) if np.isfinite(row).any()]
        labels = _layer_labels(run.config, len(values))
        maps.append(
            {
                "kind": "heat",
                "note": panel.note,
                "log": panel.log,
                "columns": columns,
                "title": panel.title + (f": {run.name}" if len(runs) > 1 else ""),
                "rows": [labels[i] for i in rows],
                "last": run.step,
                "low": _short(low),
                "high": _short(high),
                "values": [[_short(v) for v in values[i]] for i in rows],
            }
        )
    return maps


def _layer_labels(config: Mapping[str, Any], count: int) -> list[str]:
    """Numbers and mixers of the layers; the MTP module comes last."""
    if "model" not in config:
        return [str(i) for i in range(count)]
    short = {FULL: "attention", LINEAR: "delta"}
    kinds = [short[mixer] for mixer in ModelConfig.from_hf(config["model"]).mixers]
    return [f"{i} {kinds[i]}" if i < len(kinds) else "MTP" for i in range(count)]


def _scores(runs: list[Run]) -> list[dict[str, Any]]:
    names = dict.fromkeys(n for run in runs for n in run.curves if n.startswith("eval_"))
    rows = [
        {"cells": [name.removeprefix("eval_"), *(_text(run.last(name)) for run in runs)]}
        for name in names
    ]
    head = ["newest score", *(run.name for run in runs)]
    return [{"kind": "table", "title": "Newest scores", "head": head, "rows": rows}] if rows else []


def _cells(run: Run, *, several: bool) -> list[dict[str, Any]]:
    """Tables of the scores by length and depth, one for each task."""
    if run.cells is None:
        return []
    step, cells = run.cells
    parts = []
    for task in dict.fromkeys(cell["task"] for cell in cells):
        scores = {(c["depth"], c["length"]): c["score"] for c in cells if c["task"] == task}
        depths = sorted({depth for depth, _ in scores}, key=lambda d: -1 if d is None else d)
        lengths = sorted({length for _, length in scores})
        parts.append(
            {
                "kind": "cells",
                "title": task + (f": {run.name}" if several else ""),
                "note": f"score by length and depth, at step {step}",
                "corner": "depth \\ tokens",
                "rows": ["any" if d is None else f"{d:.0%}" for d in depths],
                "columns": [f"{length:,}" for length in lengths],
                "values": [[_short(scores.get((d, length))) for length in lengths] for d in depths],
            }
        )
    return parts


def _samples(run: Run, *, several: bool) -> list[dict[str, Any]]:
    steps = sorted({sample["step"] for sample in run.samples}, reverse=True)
    if not steps:
        return []
    kept = np.unique(np.linspace(0, len(steps) - 1, min(_SAMPLES, len(steps))).round().astype(int))
    groups = [
        {
            "title": f"{run.name + ', ' if several else ''}step {steps[i]}",
            "samples": [
                {"prompt": s.get("prompt", ""), "text": s.get("text", "")}
                for s in run.samples
                if s["step"] == steps[i]
            ],
        }
        for i in kept
    ]
    return [{"kind": "samples", "groups": groups}]


def _compared(
    title: str, runs: list[Run], values: list[dict[str, Any]], *, folded: bool
) -> list[dict[str, Any]]:
    """A table with a row for each key; rows in which runs differ come first."""
    rows = []
    for key in dict.fromkeys(key for run_values in values for key in run_values):
        texts = [_text(run_values.get(key)) for run_values in values]
        rows.append({"cells": [key, *texts], "differs": len(set(texts)) > 1})
    rows.sort(key=lambda row: not row["differs"])
    head = ["", *(run.name for run in runs)]
    part = {"kind": "table", "title": title, "head": head, "rows": rows, "folded": folded}
    return [part] if rows else []


def _summary(runs: list[Run]) -> dict[str, Any]:
    rows = []
    for run in runs:
        planned = run.config.get("train", {}).get("num_steps", run.step)
        tokens = run.last("tokens")
        rows.append(
            {
                "cells": [
                    run.name,
                    f"{run.step:,} of {planned:,}",
                    "–" if tokens is None else f"{tokens:,.0f}",
                    *(
                        _text(run.last(name))
                        for name in (
                            "loss",
                            "ce",
                            "eval_ce",
                            "eval_bits_per_byte",
                            "tokens_per_second",
                        )
                    ),
                    run.starts[-1].get("devices", "–") if run.starts else "–",
                ]
            }
        )
    head = ["run", "step", "tokens", "loss", "ce", "held-out ce", "bits per byte", "tokens/s",
            "devices"]  # fmt: skip
    return {"head": head, "rows": rows}


def _lines_of(path: pathlib.Path) -> list[dict[str, Any]]:
    """The complete lines of a file that may still be being written."""
    found = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        if line.endswith(b"\n"):
            with _damage_told(path, line):
                found.append(json.loads(line))
    return found


@contextlib.contextmanager
def _damage_told(path: pathlib.Path, line: bytes) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} has a damaged line, {line!r:.80}: {error}. Remove the line"
        ) from error


def _short(value: float | str | None) -> float | None:
    """Rounds to five digits, more than a screen resolves; None for NaN and infinity (or texts)."""
    return None if value is None or not math.isfinite(float(value)) else float(f"{value:.5g}")


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.5g}"
    return value if isinstance(value, str) else json.dumps(value)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m qwen3next_jax.evaluation.report",
        description="Shows a run, or several over one another, as one HTML file.",
    )
    parser.add_argument("workdir", nargs="+", help="work directories of train.py")
    parser.add_argument(
        "--output",
        help="where to write; report.html in the work directory of a single run, comparison.html "
        "here for several",
    )
    args = parser.parse_args(argv)
    single = len(args.workdir) == 1
    output = pathlib.Path(args.workdir[0]) / "report.html" if single else "comparison.html"
    output = args.output or output
    with friendly_errors():
        if args.output:
            check_writable(pathlib.Path(output))
        Report(args.workdir, output).write()
    print(output)


if __name__ == "__main__":
    main()
