"""The environment of a run: `environment.jsonl`, with a line for each start."""

import json
import pathlib
import platform
import sys
import time
from collections.abc import Iterable
from importlib import metadata
from typing import Any

import jax
from jax.sharding import Mesh

from qwen3next_jax.command import write_atomic

_PACKAGES = (
    "qwen3next_jax", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain",
    "numpy",
)  # fmt: skip


def record_environment(workdir: pathlib.Path, mesh: Mesh, *, start_step: int) -> None:
    """Adds a line: the time, the step that the run starts from, machines, versions and command."""
    if jax.process_index() > 0:
        return
    line = {"step": start_step, **environment(), "mesh": dict(mesh.shape)}
    path = workdir / "environment.jsonl"
    before = path.read_text() if path.exists() else ""
    before = before[: before.rfind("\n") + 1]  # without an incomplete line from a full disk
    write_atomic(path, before + json.dumps(line) + "\n")


def environment() -> dict[str, Any]:
    """The time in UTC, the command, the machine, the devices and the packages' versions."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": " ".join(sys.argv),
        "host": platform.node(),
        "system": platform.platform(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        **versions(_PACKAGES),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of those packages that are installed."""
    installed = {"python": platform.python_version()}
    for package in packages:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed
