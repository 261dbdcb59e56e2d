"""The plan's command, and its arithmetic against the TPU compiler."""

import json
import pathlib
import subprocess
import sys

import pytest

from qwen3next_jax.plan import tpu

ROOT = pathlib.Path(__file__).parents[1]


def plan(*options):
    return subprocess.run(
        [sys.executable, "-m", "qwen3next_jax.plan", *options],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_command_prints_one_object_as_its_last_line():
    done = plan("--config=configs/80b_a3b.py", "--config.train.num_steps=10", "--json")
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["parameters"] == sum(last["parameters_by_part"].values()) == 81_324_862_720
    assert last["flops_per_token"] == pytest.approx(8.04e9 + 106496 * 4096, rel=1e-3)
    assert last["memory_bytes"] == pytest.approx(sum(last["memory_by_part"].values()))
    assert last["fits"] is (last["memory_bytes"] <= tpu.CHIPS["v5p"].hbm)
    assert last["step_seconds"] > 0


def test_command_says_what_is_wrong_with_a_topology():
    done = plan("--config=configs/tiny.py", "--topology=v5q:4x4x4")
    assert done.returncode != 0
    assert "did you mean v5p:4x4x4" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_compiler_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'qwen3next_jax\[tpu\]'"):
        tpu.devices("v5p:2x2x1")
