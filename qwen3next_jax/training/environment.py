"""Where a run ran: `environment.jsonl`, a line for each start."""

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

from qwen3next_jax.command import write_whole

_PACKAGES = (
    "qwen3next_jax", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain",
    "numpy",
)  # fmt: skip


def keep_environment(workdir: pathlib.Path, mesh: Mesh, *, start_step: int) -> None:
    """Adds a line: when and from which step on, what machines, versions and command."""
    if jax.process_index() > 0:
        return
    line = {"step": start_step, **environment(), "mesh": dict(mesh.shape)}
    path = workdir / "environment.jsonl"
    before = path.read_text() if path.exists() else ""
    before = before[: before.rfind("\n") + 1]  # without half a line, where a disk was full
    write_whole(path, before + json.dumps(line) + "\n")


def environment() -> dict[str, Any]:
    """The time in UTC, the command, the machine and the versions of what computes."""
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
    """Python's version, and those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
