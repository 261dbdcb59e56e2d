"""Starts a command in n processes on this machine.

    python -m qwen3next_jax.launch -n 4 -- train.py --workdir=DIR

Each gets the flags `--coordinator_address`, `--num_processes` and `--process_id` behind its own.
Their output comes out line by line, marked with the process's number. SIGINT and SIGTERM go to all
of them; when the terminal is closed they get SIGTERM. When one fails, the others have `--grace`
seconds to end by themselves before they are killed, and the exit code is that of the first that
failed.

On CPUs this is how many machines are tried out on one. A machine with several GPUs or TPU chips
needs no launcher: one process drives them all.
"""

import argparse
import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import IO

_HANGUP = getattr(signal, "SIGHUP", None)  # which Windows does not have


def main(argv: list[str] | None = None) -> int:
    """Runs a command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m qwen3next_jax.launch", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("-n", "--processes", type=int, required=True, help="how many")
    parser.add_argument(
        "--grace",
        type=float,
        default=120.0,
        help="seconds for the others to end after one failed; %(default)g if not given",
    )
    parser.add_argument("command", nargs="+", help="what Python runs: a file, or -m and a module")
    args = parser.parse_args(argv)
    if args.processes < 1:
        parser.error(f"-n {args.processes} must be at least 1")
    return launch(args.command, args.processes, args.grace)


def launch(command: list[str], count: int, grace: float) -> int:
    """Runs a command of Python's in `count` processes.

    Args:
      command: what follows `python`.
      count: of processes.
      grace: seconds for the others to end after one failed.

    Returns:
      0 if all succeeded, else the code of the first that failed, 128 + number for a signal.
    """
    address = f"localhost:{_free_port()}"
    processes: list[subprocess.Popen] = []
    readers: list[threading.Thread] = []
    early: list[int] = []  # signals that came before all processes had been started

    def forward(number: int, _: object) -> None:
        if len(processes) < count:
            early.append(number)
            return
        for process in processes:
            process.send_signal(signal.SIGTERM if number == _HANGUP else number)

    heard = {signal.SIGINT, signal.SIGTERM}
    if _HANGUP and signal.getsignal(_HANGUP) != signal.SIG_IGN:  # as it is under nohup
        heard.add(_HANGUP)
    before = {s: signal.signal(s, forward) for s in heard}
    try:
        for i in range(count):
            flags = (
                f"--coordinator_address={address}",
                f"--num_processes={count}",
                f"--process_id={i}",
            )
            processes.append(_start([*command, *flags]))
        for number in early:
            forward(number, None)
        numbers = ", ".join(f"{i}: {process.pid}" for i, process in enumerate(processes))
        _tell(f"Processes {numbers}")
        for i, process in enumerate(processes):
            mark = f"[{i}] ".encode()
            for source, target in (
                (process.stdout, sys.stdout.buffer),
                (process.stderr, sys.stderr.buffer),
            ):
                reader = threading.Thread(target=_copy, args=(source, target, mark))
                reader.start()
                readers.append(reader)
        return _wait(processes, grace)
    finally:
        for process in processes:
            process.kill()  # does nothing to one that has ended
        for reader in readers:
            reader.join()
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # a Ctrl-C reaches them through us, once
    )


def _wait(processes: list[subprocess.Popen], grace: float) -> int:
    running, code, deadline = dict(enumerate(processes)), 0, float("inf")
    while running and time.monotonic() < deadline:
        for i, process in list(running.items()):
            if process.poll() is None:
                continue
            del running[i]
            if process.returncode and not code:
                how, code = _how(process.returncode)
                deadline = time.monotonic() + grace
                _tell(f"Process {i} {how}.")
        time.sleep(0.05)
    if running:
        _tell(f"Killing {', '.join(map(str, running))}, {grace:g} s later.")
    return code


def _how(returncode: int) -> tuple[str, int]:
    if returncode < 0:
        return f"was ended by {signal.Signals(-returncode).name}", 128 - returncode
    return f"ended with exit code {returncode}", returncode


def _copy(source: IO[bytes], target: IO[bytes], mark: bytes) -> None:
    for line in source:
        with contextlib.suppress(OSError):  # read on when nobody is left to read it
            target.write(mark + line)
            target.flush()


def _tell(message: str) -> None:
    with contextlib.suppress(OSError):
        print(f"[launch] {message}", file=sys.stderr, flush=True)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
