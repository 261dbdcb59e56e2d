"""The launcher of processes on one machine, with commands that need no JAX."""

import os
import signal
import subprocess

import pytest
from launched import lines, start

from qwen3next_jax.launch import launch

SHOW = "import sys; print(*sys.argv[1:]); print('to stderr', file=sys.stderr)"


def script(tmp_path, text):
    path = tmp_path / "script.py"
    path.write_text(text)
    return path


def test_each_process_gets_its_flags_and_its_lines_are_marked(tmp_path):
    launched = start(script(tmp_path, SHOW), "--mine=1", processes=3)
    out, err = launched.communicate()
    assert launched.returncode == 0
    addresses = set()
    for i in range(3):
        [line] = lines(out, i)
        mine, address, count, number = line.split()
        assert (mine, count, number) == ("--mine=1", "--num_processes=3", f"--process_id={i}")
        addresses.add(address)
        assert lines(err, i) == ["to stderr"]
    [address] = addresses
    assert address.startswith("--coordinator_address=localhost:")


def test_when_one_fails_the_others_are_killed_and_its_code_is_returned(tmp_path):
    text = "import sys, time\nif sys.argv[-1].endswith('=1'): sys.exit(7)\ntime.sleep(1000)"
    launched = start(script(tmp_path, text), processes=3, grace=0.5)
    err = launched.communicate()[1]
    assert launched.returncode == 7
    assert "Process 1 ended with exit code 7" in err
    assert "Killing 0, 2" in err


def test_the_others_may_end_by_themselves(tmp_path):
    text = (
        "import os, sys, time\nif sys.argv[-1][-1] == '0': os.kill(os.getpid(), 9)\ntime.sleep(1)"
    )
    launched = start(script(tmp_path, text))
    err = launched.communicate()[1]
    assert launched.returncode == 128 + 9
    assert "Process 0 was ended by SIGKILL" in err
    assert "Killing" not in err


def test_the_code_is_the_first_s_that_failed_whatever_the_others_end_with(tmp_path):
    text = "import sys, time\nif sys.argv[-1][-1] == '1': sys.exit(7)\ntime.sleep(5)\nsys.exit(3)"
    launched = start(script(tmp_path, text))
    assert "Killing" not in launched.communicate()[1]
    assert launched.returncode == 7


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])  # the second as a terminal is closed
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no such signal")
def test_signals_are_passed_on(tmp_path, name):
    text = (
        "import signal, sys, time\n"
        "def leave(*_): print('saved', flush=True); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, leave)\n"
        "print('ready', flush=True)\n"
        # A signal that comes just before a sleep is handled after it.
        "while True: time.sleep(0.1)\n"
    )
    # Tests that run under nohup would have the launcher ignore the second, too.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    launched = start(script(tmp_path, text))
    signal.signal(signal.SIGHUP, before)
    assert sorted(launched.stdout.readline() for _ in range(2)) == ["[0] ready\n", "[1] ready\n"]
    launched.send_signal(getattr(signal, name))
    out = launched.communicate()[0]
    assert launched.returncode == 0
    assert sorted(out.splitlines()) == ["[0] saved", "[1] saved"]


def test_a_signal_that_comes_while_processes_are_started_ends_all_of_them(tmp_path, monkeypatch):
    begin, started = subprocess.Popen, []

    def start_and_hear(*arguments, **options):
        started.append(begin(*arguments, **options))
        if len(started) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start_and_hear)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # else a failure would end pytest
    code = launch([str(script(tmp_path, "import time; time.sleep(60)"))], 3, grace=60.0)
    signal.signal(signal.SIGTERM, before)
    assert code == 128 + signal.SIGTERM
    assert [process.poll() for process in started] == [-signal.SIGTERM] * 3


def test_processes_end_when_a_later_one_cannot_be_started(tmp_path, monkeypatch):
    begin, started = subprocess.Popen, []

    def start_two(*arguments, **options):
        if len(started) == 2:
            raise BlockingIOError("no more processes")
        started.append(begin(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start_two)
    with pytest.raises(BlockingIOError, match="no more"):
        launch([str(script(tmp_path, "import time; time.sleep(60)"))], 3, grace=60.0)
    assert [process.wait(timeout=10) for process in started] == [-signal.SIGKILL] * 2
