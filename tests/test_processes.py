"""Processes that exchange, wait for each other, compare themselves and share batches."""

import os
import signal
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from launched import ROOT, run

from qwen3next_jax.parallel import processes


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """By check, what each of two processes told."""
    told = run("basics", tmp_path_factory.mktemp("basics") / "file")
    parts = [[x.split("\n") for x in "\n".join(process).split("\n--")] for process in told]
    checks = ("exchange", "first", "differ", "share", "shared")
    return {
        check: [[x for x in process[i] if x] for process in parts] for i, check in enumerate(checks)
    }


def test_each_process_learns_what_all_gave_in_every_round(told):
    expected = [str([{"process": i, "round": round_} for i in range(2)]) for round_ in range(3)]
    assert told["exchange"] == [expected] * 2


def test_the_others_read_what_process_0_wrote_first(told):
    assert told["first"] == [["written"]] * 2


def test_processes_that_differ_are_named_with_what_differs(told):
    for lines in told["differ"]:
        assert any(
            "process 1 (" in x and "config.train.seed: 1, on process 0 0" in x for x in lines
        )
        assert any("XLA_FLAGS: " in x and "/nowhere/1, on process 0 " in x for x in lines)
        assert not any("steps" in x or "devices" in x for x in lines)


def test_rows_go_to_the_processes_whose_devices_hold_them(told):
    # Rows over processes: half the rows each. Columns over processes: both need all rows.
    assert told["share"] == [["share 0 of 2", "share 0 of 1"], ["share 1 of 2", "share 0 of 1"]]


def test_a_directory_of_each_machines_own_is_noticed_whatever_it_holds(told):
    for refusal, left in told["shared"]:
        assert refusal.startswith("process 1 (")
        assert "cannot see what process 0 writes to" in refusal
        assert left == "['config.json', 'config.json']"


@pytest.mark.parametrize(("when", "step"), [("before_the_first_step", "41"), ("after_a_save", "4")])
def test_a_signal_to_one_stops_all_at_the_next_step(when, step, tmp_path):
    assert run("stop", when, tmp_path / "checkpoints") == [[step]] * 2


def test_alone_everything_is_at_hand():
    assert processes.exchange({"a": (1, 2)}) == [{"a": [1, 2]}]
    with processes.process_0_first():
        pass
    processes.require_same({"model": {"layers": 3}})
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
    share = processes.BatchShare(NamedSharding(mesh, PartitionSpec("x")), (3, 2))
    assert (share.hosts, share.host) == (1, 0)
    batch = np.arange(6).reshape(3, 2)
    np.testing.assert_array_equal(share.assemble({"x": batch})["x"], batch)


@pytest.mark.parametrize(
    "rows",
    [[(0, 3), (3, 4)], [(0, 2), (1, 3), (2, 4)]],  # by process: unequal ones, overlapping ones
)
def test_rows_that_fall_into_no_equal_shares_are_refused(rows):
    sharding = mock.Mock(jax.sharding.Sharding)
    sharding.devices_indices_map.return_value = {
        mock.Mock(process_index=i): (slice(*share), slice(None)) for i, share in enumerate(rows)
    }
    with pytest.raises(ValueError, match="The 4 rows of a batch do not fall into equal shares"):
        processes.BatchShare(sharding, (4, 8))


def test_the_description_of_a_program_tells_every_file_of_the_package():
    program = processes._program()
    assert "code parallel/processes.py" in program
    assert program["jax"] == jax.__version__


def test_a_function_runs_line_by_line_where_jit_is_disabled():
    seen = []
    call = processes.compiled_together(jax.jit(lambda x: seen.append(x) or x + 1))
    with jax.disable_jit():
        assert call(np.float32(1)) == 2
    assert seen == [1]  # a number, as a debugger shall see it, and no tracer
    assert call(np.float32(2)) == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_alone_a_signal_asks_to_stop_and_a_second_one_ends_the_process(number):
    def handlers():
        return [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]

    before = handlers()
    with processes._asked_to_stop() as should_stop:
        assert not should_stop()
        os.kill(os.getpid(), number)
        assert should_stop()
        assert handlers() == before
    assert handlers() == before


def test_half_given_processes_are_refused():
    script = (
        "from qwen3next_jax.parallel.processes import joined\n"
        "with joined(coordinator_address='localhost:1', num_processes=2): pass"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "num_processes=2, process_id=None" in done.stderr
    assert "give all three" in done.stderr
