"""Runs a check of `several.py` in several processes, as a test sees it."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
TOLD = "told: "  # before what a check tells its test


def virtual_devices(count):
    """$XLA_FLAGS of a process with so many, which compiles as this one does (conftest.py)."""
    flags = os.environ.get("XLA_FLAGS", "")
    return f"{flags} --xla_force_host_platform_device_count={count}"


def start(*command, processes=2, devices=2, grace=60.0, env=None):
    return subprocess.Popen(
        [sys.executable, "-m", "qwen3next_jax.launch", "-n", str(processes), f"--grace={grace}",
         "--", *map(str, command)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ
        | {"XLA_FLAGS": virtual_devices(devices), "JAX_PLATFORMS": "cpu"}
        | (env or {}),
    )  # fmt: skip


def lines(output, process):
    mark = f"[{process}] "
    return [line.removeprefix(mark) for line in output.splitlines() if line.startswith(mark)]


def run(check, *arguments, **kwargs):
    """The lines that each process told (`several.tell`)."""
    launched = start("tests/several.py", check, *arguments, **kwargs)
    out, err = launched.communicate()
    assert launched.returncode == 0, err
    return [
        [x.removeprefix(TOLD) for x in lines(out, i) if x.startswith(TOLD)]
        for i in range(kwargs.get("processes", 2))
    ]
