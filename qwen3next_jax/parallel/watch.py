"""Notices when a process of the run is gone, and ends this one with a message that names it.

When one process is missing, a collective hangs or fails with a message about a socket, or JAX's
coordinator aborts everything with a stack trace; none of these names the host that failed. So every
process increments a counter in the coordinator's key-value store a few times per `timeout`. Process
0 reads all counters; when one has not changed for too long, process 0 writes a verdict, for which
all processes look as often.

If process 0 itself is gone, the others notice because their own calls fail, unless JAX is faster:
if the connection is closed, as when the process dies but not its machine, JAX aborts at once. The
only hook for that is the signal.

A process that ends with an exception writes the verdict itself, so that the others end at once. An
exception from JAX's runtime proves nothing, though: a collective also fails because another process
died. After such an exception, a process first waits for a verdict.
"""

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from absl import logging

_BEATS, _VERDICT = "qwen3next_jax/beats/", "qwen3next_jax/verdict"
EXIT_CODE = 1


class Watch:
    """Watches over the processes of a run until `stop`."""

    def __init__(self, client: Any, address: str, me: int, hosts: list[str], timeout: float):
        """Starts the watch.

        Args:
          client: client of JAX's coordinator.
          address: host:port of the coordinator.
          me: index of this process.
          hosts: name of each process's machine.
          timeout: seconds within which this process ends after another one died.
        """
        self._client, self._me, self._hosts, self._timeout = client, me, hosts, timeout
        self._interval = timeout / 10
        self._patience = timeout - 3 * self._interval  # the rest is for delivering the verdict
        # Process 0 ends last: when its store is gone, JAX aborts those that have not ended yet.
        self._delivery = self._interval * (2 if me == 0 else 1)
        self._answered = time.monotonic()
        self._leaving = threading.Event()
        if me != 0:
            self._abort_handler = _on_abort(partial(self._explain_abort, address))
        self._threads = [
            threading.Thread(target=run, name=run.__name__, daemon=True)
            for run in (self._beat, self._watch_coordinator)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends the watch; all processes must have finished."""
        self._leaving.set()
        for thread in self._threads:
            thread.join()

    def report(self, error: BaseException) -> None:
        """Tells the others that this process ends with `error`; returns when they know.

        If the error may be caused by another process's death, this method first waits for a
        verdict, which ends this process if there is one.
        """
        if _from_runtime(error):
            logging.error(
                "%s: %s\nWaiting up to %g s to learn if another process is the reason",
                type(error).__name__,
                str(error).partition("\n")[0],
                self._timeout,
            )
            time.sleep(self._timeout)  # a verdict ends the process in the meantime
        self._leaving.set()
        self._say(f"{self._name(self._me)} failed: {type(error).__name__}: {error}")
        if self._me == 0:
            time.sleep(self._delivery)  # let the others read the store, which ends with process 0

    def _beat(self) -> None:
        seen: dict[str, tuple[str, float]] = {}
        number = 0
        while True:
            number += 1
            # A call that fails tells nothing: it is made again.
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                mine = f"{_BEATS}{self._me}"
                self._client.key_value_set(mine, str(number), allow_overwrite=True)
                if self._me == 0:
                    self._look_for_missing(seen)
                verdict = self._verdict()
                self._answered = time.monotonic()
                if verdict is not None:
                    self._end(json.loads(verdict))
                    return
            if self._leaving.wait(self._interval / 4):
                return

    def _verdict(self) -> str | None:
        # Not by a call that waits: of each that ends without an answer JAX keeps some 20 KB, in the
        # process that calls and in the coordinator's, for as long as the run lasts.
        try:
            return self._client.key_value_try_get(_VERDICT)
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" in str(error):
                return None
            raise

    def _look_for_missing(self, seen: dict[str, tuple[str, float]]) -> None:
        now = time.monotonic()
        counters = {f"{_BEATS}{i}": "0" for i in range(len(self._hosts))}
        counters |= dict(self._client.key_value_dir_get(_BEATS))
        for key, counter in counters.items():
            if key not in seen or seen[key][0] != counter:
                seen[key] = (counter, now)
        silent = [key for key, (_, since) in seen.items() if now - since > self._patience]
        if silent:
            names = [self._name(int(key.rpartition("/")[2])) for key in silent]
            self._say(
                f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} missing: no sign of "
                f"life for {self._patience:.0f} s"
            )

    def _watch_coordinator(self) -> None:
        # In a separate thread, because a call to a stopped process may not return for minutes.
        while self._me != 0 and not self._leaving.wait(self._interval / 2):
            silence = time.monotonic() - self._answered
            if silence > self._timeout - 2 * self._interval:
                self._end(
                    f"{self._name(0)}, the coordinator, is missing: no answer for {silence:.0f} s"
                )

    def _explain_abort(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=self._interval).close()
        except OSError:
            line = f"{self._name(0)}, the coordinator, is missing. Ending {self._name(self._me)}."
            os.write(2, f"{line} The same command goes on from the last checkpoint.\n".encode())
            os._exit(EXIT_CODE)

    def _say(self, message: str) -> None:
        verdict = json.dumps(message)  # ASCII, whatever a message quotes
        # The call fails if there is a verdict already, or if the coordinator is gone.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(_VERDICT, verdict)

    def _end(self, message: str) -> None:
        # If this process is about to end by itself, perhaps for the same reason, let it.
        if self._leaving.wait(self._delivery):
            return
        logging.error(
            "%s\nEnding %s. The same command goes on from the last checkpoint.",
            message,
            self._name(self._me),
        )
        logging.flush()
        # The main thread may be in a collective that never returns.
        os._exit(EXIT_CODE)

    def _name(self, process: int) -> str:
        return f"process {process} ({self._hosts[process]})"


def _on_abort(explain: Callable[[], None]) -> Any:
    """Makes SIGABRT call `explain` and then the previous handler.

    A Python signal handler would only run after abort() returns to Python, which it never does.

    Returns:
      The handler, which the caller must keep alive.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handler(number: int) -> None:
        explain()
        libc.signal(number, before)
        signal.raise_signal(number)

    before = libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    return handler


def _from_runtime(error: BaseException | None) -> bool:
    """Whether an error may be JAX's reaction to the death of another process."""
    while error is not None:
        # The type of the exception depends on where the failed collective is awaited, such as
        # ValueError("UNKNOWN: Gloo ...
        status = re.match("([A-Z_]+): ", str(error))
        if status and status[1] not in ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT"):
            return True
        error = error.__cause__ or error.__context__
    return False
