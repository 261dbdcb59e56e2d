"""The files a run reports to, also after kills, and the line on the terminal."""

import contextlib
import json
import math
import pathlib

import jax.numpy as jnp
import pytest
from tensorboardX.proto.event_pb2 import Event

from qwen3next_jax.training import metrics as metrics_module
from qwen3next_jax.training.metrics import MetricWriter, Progress


def read(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def write(workdir, steps, start_step=0):
    writer = MetricWriter(workdir, start_step=start_step)
    for step in steps:
        writer.write(step, {"loss": 1.0 / step})
    writer.close()


def test_each_line_is_on_disk_at_once_and_reads_back_as_written(tmp_path):
    writer = MetricWriter(tmp_path / "new" / "run")
    writer.write(10, {"loss": jnp.float32(0.5), "tokens": 12345678901, "rate": 1e-3})
    expected = {"step": 10, "loss": 0.5, "tokens": 12345678901, "rate": 1e-3}
    assert read(tmp_path / "new" / "run") == [expected]  # the writer is still open
    tags = [value.tag for e in events(tmp_path / "new" / "run") for value in e.summary.value]
    assert tags == ["loss", "tokens", "rate"]
    writer.close()


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="Linux has /dev/full")
@pytest.mark.parametrize("file", ["metrics.jsonl", "tensorboard"])
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, monkeypatch, file):
    writer = MetricWriter(tmp_path)
    writer.close()
    full = open("/dev/full", "w" if file == "metrics.jsonl" else "wb")  # noqa: SIM115
    if file == "metrics.jsonl":
        monkeypatch.setattr(metrics_module, "_open_truncated", lambda *_: full)
        file = "/dev/full"
    else:
        monkeypatch.setattr("tensorboardX.record_writer.open_file", lambda _: full)
    writer = MetricWriter(tmp_path)
    with pytest.raises(OSError, match=f"No space left on device: '.*{file}'"):
        writer.write(1, {"loss": 1.0})
    with pytest.raises(OSError, match=f"No space left on device: '.*{file}'"):
        writer.close()  # tries once more
    with contextlib.suppress(OSError):
        full.close()


def test_non_finite_numbers_are_strings_in_valid_json(tmp_path):
    writer = MetricWriter(tmp_path)
    values = {"a": math.nan, "b": jnp.inf, "c": -jnp.float32(jnp.inf)}
    writer.write(1, values)
    writer.close()

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "a": "nan", "b": "inf", "c": "-inf"}
    assert [float(line[name]) for name in "bc"] == [math.inf, -math.inf]


def test_lists_are_kept_and_tensorboard_gets_their_numbers(tmp_path):
    writer = MetricWriter(tmp_path)
    cells = [{"task": "needle", "length": 512, "depth": 0.5, "score": 1.0}]
    writer.write(1, {"layers/gate": [0.5, None, math.nan], "eval_long_context_cells": cells})
    writer.close()
    assert read(tmp_path) == [
        {"step": 1, "layers/gate": [0.5, None, "nan"], "eval_long_context_cells": cells}
    ]
    tags = [(v.tag, v.simple_value) for e in events(tmp_path) for v in e.summary.value]
    assert tags[0] == ("layers/gate/0", 0.5)
    assert [tag for tag, _ in tags] == ["layers/gate/0", "layers/gate/2"]


def test_samples_are_cut_back_as_metrics_are(tmp_path):
    for resume, steps in ((0, (10, 20)), (10, (20,))):
        writer = MetricWriter(tmp_path, start_step=resume)
        for step in steps:
            writer.write_samples(step, [{"prompt": "a", "text": "b"}, {"prompt": "", "text": "é"}])
        writer.close()
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 10, 20, 20]
    assert lines[1] == {"step": 10, "prompt": "", "text": "é"}


def test_going_on_from_a_checkpoint_leaves_one_line_a_step(tmp_path):
    write(tmp_path, [10, 20, 30, 40])
    write(tmp_path, [30, 40, 50], start_step=20)
    assert [line["step"] for line in read(tmp_path)] == [10, 20, 30, 40, 50]


def test_a_new_course_drops_the_lines_of_the_old(tmp_path):
    write(tmp_path, [10, 20])
    write(tmp_path, [10])
    assert [line["step"] for line in read(tmp_path)] == [10]


@pytest.mark.parametrize(
    "half", ['{"step": 20, "lo', '{"step": 2', '{"step": 20}', "\0\0", "2", "[]"]
)
def test_a_half_written_last_line_is_dropped_or_completed(tmp_path, half):
    write(tmp_path, [10])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(half)
    write(tmp_path, [30], start_step=20)
    whole = [20] if half == '{"step": 20}' else []  # all there but the line's end
    assert [line["step"] for line in read(tmp_path)] == [10, *whole, 30]


def test_a_kill_while_cutting_back_loses_nothing(tmp_path, monkeypatch):
    write(tmp_path, [10, 20, 30])
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(metrics_module.os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricWriter(tmp_path, start_step=10)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    monkeypatch.undo()
    write(tmp_path, [20], start_step=10)
    assert [line["step"] for line in read(tmp_path)] == [10, 20]


def events(workdir):
    """Reads TensorBoard's records: length (8 bytes), a checksum (4), an event, a checksum (4)."""
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            yield Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]


def test_tensorboard_gets_the_same_numbers_and_hides_what_was_cut(tmp_path):
    write(tmp_path, [1, 2])
    write(tmp_path, [2], start_step=1)
    found = list(events(tmp_path))
    values = [(e.step, v.tag, v.simple_value) for e in found for v in e.summary.value]
    assert sorted(values) == [(1, "loss", 1.0), (2, "loss", 0.5), (2, "loss", 0.5)]
    # A "session start" event tells TensorBoard to drop earlier events from its step on.
    assert 2 in [e.step for e in found if e.HasField("session_log")]


def test_progress_is_plain_lines_where_stderr_is_no_terminal(capsys, monkeypatch):
    clock = iter([100.0, 130.0, 190.0])  # 20 steps in 30 s, 60 in 90 s; compilation before them
    monkeypatch.setattr(metrics_module.time, "monotonic", lambda: next(clock))
    progress = Progress(200, start_step=40)
    progress.update(41, loss=3.0, tokens_per_second=0.0)
    progress.update(61, loss=2.5, tokens_per_second=12345.6)
    progress.update(101, loss=2.25, tokens_per_second=9.0)
    progress.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "step 41/200  loss 3.0000  compiled",
        "step 61/200  loss 2.5000  12,346 tokens/s  03:28 left",
        "step 101/200  loss 2.2500  9 tokens/s  02:28 left",
    ]


def test_progress_is_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(metrics_module.sys.stderr, "isatty", lambda: True)
    progress = Progress(200, start_step=40)
    progress.update(60, loss=2.5, tokens_per_second=12345.6)
    progress.close()
    last = capsys.readouterr().err.rstrip().split("\r")[-1]
    assert "60/200" in last
    assert "loss 2.5000, 12,346 tokens/s" in last


def test_a_bar_begins_at_the_step_that_the_run_goes_on_from(capsys, monkeypatch):
    monkeypatch.setattr(metrics_module.sys.stderr, "isatty", lambda: True)
    Progress(200, start_step=40).close()
    assert "40/200" in capsys.readouterr().err
