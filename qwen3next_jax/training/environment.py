"""Where a run ran: `environment.jsonl`, a line for each start."""

import json
import pathlib
import platform
import sys
import time
from importlib import metadata
from typing import Any

import jax
from jax.sharding import Mesh

_PACKAGES = (
    "qwen3next_jax", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain",
    "numpy",
)  # fmt: skip


def keep_environment(workdir: pathlib.Path, mesh: Mesh, *, start_step: int) -> None:
    """Adds a line: when and from which step on, what machines, versions and command."""
    if jax.process_index() > 0:
        return
    line = {"step": start_step, **environment(), "mesh": dict(mesh.shape)}
    with (workdir / "environment.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def environment() -> dict[str, Any]:
    """The time in UTC, the command, the machine and the versions of what computes."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": " ".join(sys.argv),
        "host": platform.node(),
        "system": platform.platform(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "python": platform.python_version(),
        **{name: version for name in _PACKAGES if (version := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
