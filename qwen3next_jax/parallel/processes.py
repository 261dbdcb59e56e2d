"""Several processes that run one program: how they join, agree, share batches and leave.

Each process runs the same program on its own devices, and a collective operation waits for all of
them. If one process takes a different branch, the others hang. So three things need care:

- *The processes must be the same.* With a different config, code or version of JAX, a process would
  run a different program, and hang or, worse, compute something else. `require_same` checks this at
  the start.
- *They must agree.* A fact that one process learns alone (is this checkpoint damaged?) is exchanged
  before any process acts on it. `exchange` uses the coordinator's key-value store, not the devices,
  so it compiles nothing and does not wait for computations in progress.
- *A process may die.* See `watch.py`.

With a single process all of this does nothing, and costs nothing.
"""

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import secrets
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from absl import logging

# For the client of JAX's coordinator; its key-value store has no public API.
from jax._src import distributed
from jax.experimental import multihost_utils

from qwen3next_jax.config import flatten
from qwen3next_jax.parallel.watch import Watch

_DAY_MS = 86_400_000  # practically no timeout: the watch ends this process if a peer is dead
_LEAVING_MS = 60_000

_UNSEEN_SECONDS = 60  # network file systems may cache for so long that a file does not exist

# Packages on whose versions the compiled program depends.
_PACKAGES = ("jax", "jaxlib", "flax", "optax")

_rounds = itertools.count()

T = TypeVar("T")
ShouldStop = Callable[[], bool]


class Stopped(Exception):
    """The run was asked to stop, and does."""


def unless_stopped(items: Iterable[T], should_stop: ShouldStop) -> Iterator[T]:
    """Yields the items; raises `Stopped` before one once the run is asked to stop."""
    for item in items:
        if should_stop():
            raise Stopped
        yield item


@contextlib.contextmanager
def joined(
    *,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    peer_timeout: float = 100.0,
) -> Iterator[ShouldStop]:
    """Joins the processes of this run for a `with` block; must precede any other use of JAX.

    JAX detects arguments that are None from SLURM, Open MPI, Kubernetes or the metadata of a TPU
    pod. Without any of these, the run has a single process.

    Args:
      coordinator_address: host:port on which process 0 listens and which all others connect to.
      num_processes: number of processes.
      process_id: index of this process, from 0.
      peer_timeout: seconds without a sign of life after which a process counts as missing. The
        others then end, with a message that names it.

    Yields:
      A function that returns whether to save and stop now: once any process has received SIGTERM,
      it returns True in all of them from the same call on. Call it equally often in all processes,
      at least once a step.

    Raises:
      ValueError: if the arguments do not fit together.
    """
    # JAX must not abort this process because of a dead peer before it has reported which one died.
    jax.config.update("jax_enable_recoverability", True)
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            # JAX's own detection is only a fallback, because its message names no host.
            heartbeat_timeout_seconds=int(2 * peer_timeout) + 10,
            shutdown_timeout_seconds=10,
        )
    except ValueError as error:
        if (coordinator_address, num_processes, process_id) != (None, None, None):
            raise ValueError(
                f"Cannot join with coordinator_address={coordinator_address!r}, num_processes="
                f"{num_processes!r}, process_id={process_id!r}: {error} Outside of SLURM, Open "
                "MPI, Kubernetes and TPU pods give all three."
            ) from None
        # No cluster was found.
        with _asked_to_stop() as stop:
            yield stop
        return
    with _watched(peer_timeout):
        # The coordinator forwards SIGTERM from any process to all, and picks one number at which
        # all stop: one more than the highest that any has called with, or 1 before any call.
        calls, stopping = itertools.count(1), False

        def should_stop() -> bool:
            nonlocal stopping
            stopping = stopping or multihost_utils.reached_preemption_sync_point(next(calls))
            return stopping

        yield should_stop


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[ShouldStop]:
    """Turns a first SIGTERM or Ctrl-C into a request to stop; a second one ends the process."""
    received = []

    def receive(number: int, _: Any) -> None:
        received.append(number)
        for name, handler in before.items():
            signal.signal(name, handler)
        logging.warning(
            "%s: saving after this step, then leaving; once more ends at once",
            signal.Signals(number).name,
        )

    before = {name: signal.signal(name, receive) for name in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(received)
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


@contextlib.contextmanager
def _watched(peer_timeout: float) -> Iterator[None]:
    state = distributed.global_state
    # Ordered by the coordinator's process ids; on TPUs `jax.process_index()` may differ from them.
    hosts = [host for _, host in sorted(exchange([state.process_id, socket.gethostname()]))]
    if jax.process_index():
        logging.set_verbosity(logging.WARNING)  # only process 0 logs the progress
    logging.info("%d processes on %s", len(hosts), ", ".join(sorted(set(hosts))))
    address = str(state.coordinator_address)
    watch = Watch(state.client, address, state.process_id, hosts, peer_timeout)
    try:
        yield
        exchange("finished")
    except BaseException as error:
        if not (isinstance(error, SystemExit) and not error.code):
            watch.report(error)
        raise
    watch.stop()
    _leave()


def _leave() -> None:
    """Disconnects; process 0 last, because JAX aborts the others when the coordinator is gone."""
    client: Any = distributed.global_state.client
    if (me := distributed.global_state.process_id) == 0:
        for process in range(1, jax.process_count()):
            # One that is killed now does not say so, and nobody watches over it any more.
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                client.blocking_key_value_get(f"qwen3next_jax/left/{process}", _LEAVING_MS)
        time.sleep(2)  # lets the others disconnect, which they cannot report afterwards
    else:
        client.key_value_set(f"qwen3next_jax/left/{me}", "")
    jax.distributed.shutdown()


def exchange(value: Any) -> list[Any]:
    """Gathers a value from every process; also acts as a barrier.

    All processes must make the same sequence of calls, each from a single thread.

    Args:
      value: JSON-serialisable value of this process.

    Returns:
      The values of all processes, in the order of `jax.process_index()`.
    """
    client = distributed.global_state.client
    if client is None:
        return [json.loads(json.dumps(value))]
    number, me = next(_rounds), jax.process_index()
    folder = f"qwen3next_jax/exchange/{number}/"
    client.key_value_set(f"{folder}{me}", json.dumps(value))
    client.wait_at_barrier(folder, _DAY_MS)
    found = {int(key.rpartition("/")[2]): x for key, x in client.key_value_dir_get(folder)}
    # All processes have reached this barrier, so they have read the previous round's values.
    client.key_value_delete(f"qwen3next_jax/exchange/{number - 1}/{me}")
    return [json.loads(found[i]) for i in range(len(found))]


@contextlib.contextmanager
def process_0_first() -> Iterator[None]:
    """Runs the `with` block in process 0, then in the others, which may read what it wrote."""
    if jax.process_index() > 0:
        exchange(None)
    yield
    if jax.process_index() == 0:
        exchange(None)


def require_shared(folder: pathlib.Path) -> None:
    """Checks that all processes see the same directory.

    Args:
      folder: path of an existing directory.

    Raises:
      ValueError: in all processes; names those that do not see what process 0 writes there.
    """
    if jax.process_count() == 1:
        return
    # A new name, because a file of an earlier run proves nothing.
    mark = None
    if jax.process_index() == 0:
        mark = folder / f".shared-{secrets.token_hex(8)}"
        mark.touch()
    there = folder / exchange(mark and mark.name)[0]
    for _ in range(_UNSEEN_SECONDS):
        if there.exists():
            break
        time.sleep(1)
    seen = exchange([socket.gethostname(), there.exists()])
    if mark:
        mark.unlink()
    blind = [f"process {i} ({host})" for i, (host, sees) in enumerate(seen) if not sees]
    if blind:
        raise ValueError(
            f"{', '.join(blind)} cannot see what process 0 writes to {folder}; the work directory "
            "must be on a file system that all machines share"
        )


def compiled_together(function: Any) -> Callable[..., Any]:
    """Wraps a jitted function so that no process runs it before all have compiled it.

    On CPUs, the first collective of a program fails if a process is half a minute late. Under
    `jax.disable_jit` nothing is compiled, and the function runs op by op.
    """
    compiled = None

    def call(*args: Any) -> Any:
        nonlocal compiled
        if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
            return function(*args)
        if compiled is None:
            compiled = function.lower(*args).compile()
            exchange(None)
        return compiled(*args)

    return call


def require_same(config: Mapping[str, Any]) -> None:
    """Compares this process's config, code and versions with those of process 0.

    Args:
      config: nested config of JSON-serialisable values.

    Raises:
      ValueError: in all processes, if any differs; lists the processes and their differences.
    """
    mine = _program()
    mine |= {key: json.dumps(value) for key, value in flatten({"config": config}).items()}
    text = json.dumps(mine)
    theirs = json.loads(exchange(text if jax.process_index() == 0 else None)[0])
    differences = [
        f"{key}: {mine.get(key, 'missing')}, on process 0 {theirs.get(key, 'missing')}"
        for key in sorted(mine.keys() | theirs.keys())
        if mine.get(key) != theirs.get(key)
    ]
    found = exchange([socket.gethostname(), differences])
    if any(lines for _, lines in found):
        raise ValueError(
            "The processes differ; start all with the same command from the same code:\n  "
            + "\n  ".join(
                f"process {process} ({host}): {line}"
                for process, (host, lines) in enumerate(found)
                for line in lines
            )
        )


def _program() -> dict[str, str]:
    """Everything besides the config that determines the compiled program."""
    package = pathlib.Path(__file__).parents[1]
    code = {
        f"code {path.relative_to(package)}": hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        for path in sorted(package.rglob("*.py"))
    }
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {
        **code,
        **versions,
        "python": platform.python_version(),
        "devices": f"{jax.local_device_count()} {jax.local_devices()[0].device_kind}",
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


class BatchShare:
    """Which rows of each batch this process reads, and how all processes' rows form one array.

    Processes whose devices hold the same rows read the same share, for example if a context or
    tensor axis spans several processes.

    Attributes:
      hosts: number of different shares.
      host: index of this process's share.
    """

    def __init__(self, sharding: jax.sharding.Sharding, shape: tuple[int, int]):
        """Divides the batch.

        Args:
          sharding: sharding of the batch's arrays.
          shape: shape (B, T) of the global arrays.

        Raises:
          ValueError: if the rows of the processes' devices are not equal, disjoint shares.
        """
        self._sharding, self._shape = sharding, shape
        held: dict[int, set[int]] = {}
        places: Mapping[Any, Any] = sharding.devices_indices_map(shape)
        for device, (rows, _) in places.items():
            held.setdefault(device.process_index, set()).update(range(*rows.indices(shape[0])))
        shares = sorted({tuple(sorted(rows)) for rows in held.values()})
        if sorted(row for share in shares for row in share) != list(range(shape[0])) or (
            len({len(share) for share in shares}) > 1
        ):
            raise ValueError(
                f"The {shape[0]} rows of a batch do not fall into equal shares of whole rows for "
                f"{jax.process_count()} processes; choose mesh.data x mesh.fsdp x mesh.expert as a "
                "multiple of the processes, or a divisor"
            )
        self._rows = tuple(sorted(held[jax.process_index()]))
        self.hosts, self.host = len(shares), shares.index(self._rows)

    def assemble(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Makes global arrays [B, T] from this share's rows [B / hosts, T]."""
        return {name: self._global(x) for name, x in batch.items()}

    def _global(self, local: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            rows = range(*index[0].indices(self._shape[0]))
            first = self._rows.index(rows.start)
            return local[first : first + len(rows), index[1]]

        return jax.make_array_from_callback(self._shape, self._sharding, part)
