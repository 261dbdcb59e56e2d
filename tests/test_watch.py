"""When a process of a run dies, stands still or fails, the others end and say which one."""

import re

import pytest
from launched import lines, start


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
