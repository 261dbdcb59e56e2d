"""When a process of a run dies, stands still or fails, the others end and say which one."""

import json
import re
import threading

import jax
import pytest
from launched import lines, start

from qwen3next_jax.parallel import watch


def ended(how):
    """Which processes ended how, and what each said."""
    launched = start("tests/several.py", "work", how, processes=3, devices=1)
    err = launched.communicate()[1]
    return launched.returncode, [lines(err, i) for i in range(3)], err


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_the_others_name_a_process_that_was_killed(victim):
    code, said, err = ended(f"kill_{victim}")
    assert code == 128 + 9, err
    for process in {0, 1, 2} - {victim}:
        assert any(re.search(rf"process {victim} \(.+\).* is missing", x) for x in said[process]), (
            err
        )
    assert "Killing" not in err  # they ended by themselves


def test_the_others_name_a_process_that_failed_with_its_error():
    code, said, err = ended("fail_2")
    assert code == 1, err
    for process in (0, 1):
        assert any(
            re.search(r"process 2 \(.+\) failed: RuntimeError: the disk is full", x)
            for x in said[process]
        ), err


@pytest.mark.slow
def test_the_others_name_a_process_that_stands_still():
    launched = start("tests/several.py", "work", "stop_1", processes=3, devices=1, grace=2)
    err = launched.communicate()[1]
    for process in (0, 2):
        assert any(re.search(r"process 1 \(.+\) is missing", x) for x in lines(err, process)), err


class Store:
    """The coordinator's store, in this process and without calls that wait."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        if key in self.values and not allow_overwrite:
            raise jax.errors.JaxRuntimeError(f"ALREADY_EXISTS: {key}")
        self.values[key] = value

    def key_value_try_get(self, key):
        if key not in self.values:
            raise jax.errors.JaxRuntimeError(f"NOT_FOUND: {key}")
        return self.values[key]

    def key_value_dir_get(self, folder):
        return [item for item in self.values.items() if item[0].startswith(folder)]


def test_a_verdict_is_found_by_calls_that_return_at_once(monkeypatch):
    store, ended = Store(), threading.Event()
    monkeypatch.setattr(watch.os, "_exit", lambda code: ended.set())
    watching = watch.Watch(store, "nowhere:1", 0, ["here"], timeout=0.5)
    assert not ended.wait(0.5)  # many rounds without a verdict
    store.key_value_set(watch._VERDICT, json.dumps("process 1 is missing"))
    assert ended.wait(10)
    watching.stop()


def test_a_watch_ends_at_once_when_its_run_is_finished():
    watching = watch.Watch(Store(), "nowhere:1", 0, ["here"], timeout=1e6)
    watching.stop()
    assert not any(thread.is_alive() for thread in watching._threads)
