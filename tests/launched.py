"""Runs programs in processes of their own, with other devices or several at a time."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
TESTS = pathlib.Path(__file__).parent
TOLD = "told: "  # prefix of the lines that a check sends to its test


def virtual_devices(count):
    """$XLA_FLAGS for `count` CPU devices and the compiler options of this process (conftest.py)."""
    flags = os.environ.get("XLA_FLAGS", "")
    return f"{flags} --xla_force_host_platform_device_count={count}"


def run_python(*arguments, devices=None, env=None, **kwargs):
    """Runs Python with our package and the test helpers on its path.

    Args:
      arguments: Python's arguments, such as a script in `tests/` or "-c" and a program.
      devices: number of virtual CPU devices; None: as in this process.
      env: environment variables to set; None as a value removes one.
      kwargs: arguments of `subprocess.run`.
    """
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(TESTS)]))
    if devices is not None:
        environment["XLA_FLAGS"] = virtual_devices(devices)
    for name, value in (env or {}).items():
        environment.pop(name, None)
        if value is not None:
            environment[name] = value
    kwargs = {"text": True, **kwargs}
    return subprocess.run([sys.executable, *map(str, arguments)], env=environment, **kwargs)


def start(*command, processes=2, devices=2, grace=60.0, env=None):
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "qwen3next_jax.launch",
            "-n",
            str(processes),
            f"--grace={grace}",
            "--",
            *map(str, command),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ
        | {"XLA_FLAGS": virtual_devices(devices), "JAX_PLATFORMS": "cpu"}
        | (env or {}),
    )


def lines(output, process):
    mark = f"[{process}] "
    return [line.removeprefix(mark) for line in output.splitlines() if line.startswith(mark)]


def run(check, *arguments, **kwargs):
    """Runs a check of `several.py`; returns the lines that each process told (`several.tell`)."""
    launched = start("tests/several.py", check, *arguments, **kwargs)
    out, err = launched.communicate()
    assert launched.returncode == 0, err
    return [
        [x.removeprefix(TOLD) for x in lines(out, i) if x.startswith(TOLD)]
        for i in range(kwargs.get("processes", 2))
    ]
