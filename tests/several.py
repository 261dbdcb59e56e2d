"""What `tests/test_*.py` run in several processes, each check by its name.

python -m qwen3next_jax.launch -n 2 -- tests/several.py CHECK [argument ...]
"""

import os
import pathlib
import re
import signal
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import AxisType, NamedSharding, PartitionSpec  # noqa: E402
from launched import TOLD  # noqa: E402

from qwen3next_jax.checkpoint.store import CheckpointStore  # noqa: E402
from qwen3next_jax.parallel import processes  # noqa: E402

PEER_TIMEOUT = 12.0  # more than a loaded machine keeps a thread waiting


def tell(*what):
    """Lines for the test, marked: Gloo chats on stdout, in pieces and from its own threads. In one
    write, which reaches the pipe whole even just before a kill."""
    text = " ".join(map(str, what))
    os.write(1, "".join(f"\n{TOLD}{line}\n" for line in text.splitlines()).encode())


def exchange():
    me = jax.process_index()
    for round_ in range(3):
        tell(processes.exchange({"process": me, "round": round_}))


def first(path):
    with processes.process_0_first():
        if jax.process_index() == 0:
            time.sleep(1)
            pathlib.Path(path).write_text("written")
        tell(pathlib.Path(path).read_text())


def differ():
    os.environ["XLA_FLAGS"] += f" --xla_dump_to=/nowhere/{jax.process_index()}"  # too late to act
    try:
        processes.require_same({"train": {"seed": jax.process_index(), "steps": 3}})
    except ValueError as error:
        tell(error)


def share():
    mesh = jax.make_mesh((2, 2), ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)
    for spec in (PartitionSpec("rows", "columns"), PartitionSpec("columns", "rows")):
        batch = np.arange(4 * 6, dtype=np.int32).reshape(4, 6)
        part = processes.BatchShare(NamedSharding(mesh, spec), batch.shape)
        rows = 4 // part.hosts
        array = part.assemble({"tokens": batch[part.host * rows :][:rows]})["tokens"]
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, batch[shard.index])
        tell(f"share {part.host} of {part.hosts}")


def shared(folder):
    """One directory for both, then one for each, which hold the same file of an earlier run."""
    processes._UNSEEN_SECONDS = 1
    processes.require_shared(folder)
    mine = folder / str(jax.process_index())
    mine.mkdir()
    (mine / "config.json").touch()
    try:
        processes.require_shared(mine)
    except ValueError as error:
        tell(error)
    processes.exchange(None)
    tell(sorted(path.name for path in folder.glob("*/*")))


def basics(path):
    """In one start, as starting takes longer than all of them."""
    folder = pathlib.Path(path).parent
    for check in (exchange, lambda: first(path), differ, share, lambda: shared(folder)):
        check()
        tell("--")


def layout(devices, *axes):
    mesh = jax.make_mesh(devices, ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    return NamedSharding(mesh, PartitionSpec(*axes))


def big_state(step):
    return {
        "w": np.random.default_rng(step).standard_normal((24, 16, 6), np.float32),
        "b": np.arange(24, dtype=jnp.bfloat16) + step,
        "step": np.int32(step),
    }


def place(state, sharding):
    return {
        "w": jax.make_array_from_callback(state["w"].shape, sharding, lambda i: state["w"][i]),
        "b": jax.make_array_from_callback(
            state["b"].shape,
            NamedSharding(sharding.mesh, PartitionSpec("b")),
            lambda i: state["b"][i],
        ),
        "step": jax.make_array_from_callback(
            (), NamedSharding(sharding.mesh, PartitionSpec()), lambda i: state["step"]
        ),
    }


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_holds(arrays, state):
    for name, array in arrays.items():
        for shard in array.addressable_shards:
            assert np.asarray(shard.data).tobytes() == state[name][shard.index].tobytes(), name


def save(directory, *steps):
    store = CheckpointStore(directory, keep=3)
    n = jax.device_count()
    for step in map(int, steps):
        store.save(
            step, place(big_state(step), layout((n // 2, 2), "a", None, "b")), {"step": step}
        )
    store.close()


def restore(directory, step):
    store = CheckpointStore(directory)
    for shape, axes in (((jax.device_count(), 1), ("a",)), ((1, jax.device_count()), (None, "b"))):
        wanted = place(big_state(0), layout(shape, *axes))
        found, arrays, extras = store.restore_latest(abstract(wanted))
        assert (found, extras) == (int(step), {"step": int(step)})
        assert_holds(arrays, big_state(found))
    store.close()


def damaged_for_one(directory):
    """Process 1 alone cannot read step 20."""
    read = CheckpointStore._read_array

    def fail(self, step, *rest):
        if jax.process_index() == 1 and step == 20:
            raise ValueError("out of order")
        return read(self, step, *rest)

    CheckpointStore._read_array = fail
    store = CheckpointStore(directory)
    wanted = abstract(place(big_state(0), layout((jax.device_count(), 1), "a")))
    step, arrays, _ = store.restore_latest(wanted)
    assert_holds(arrays, big_state(step))
    tell("took", step)
    store.close()


def checkpoints(directory):
    save(directory, 10, 20)
    restore(directory, 20)
    damaged_for_one(directory)


def stop(when, directory):
    """SIGTERM to process 1, before its first step or after a save; tells the step to stop at."""
    first = 41  # of a run that goes on
    if when == "after_a_save":
        first = 4
        for _ in range(1, first):
            assert not should_stop()
        save(directory, 1)  # as if its files had taken two steps to write
    processes.exchange(None)
    if jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)  # until the processes have picked a step
    for step in range(first, first + 60):
        processes.exchange(None)  # a step
        if should_stop():
            assert should_stop()  # once asked, always
            return tell(step)
        time.sleep(0.1)
    tell("never")


def work(how):
    """Collectives without end; process `how` names dies, fails or stands still on the way."""
    what, victim = re.fullmatch(r"(\w+?)_(\d)", how).groups()
    x = place(big_state(0), layout((jax.device_count(), 1), "a"))["w"]
    total = jax.jit(lambda x: x.sum())
    for step in range(10**6):
        total(x).block_until_ready()
        if step == 20 and jax.process_index() == int(victim):
            if what == "fail":
                raise RuntimeError("the disk is full")
            os.kill(os.getpid(), getattr(signal, f"SIG{what.upper()}"))


if __name__ == "__main__":
    flags = dict(x.removeprefix("--").split("=") for x in sys.argv[1:] if x.startswith("--"))
    check, *arguments = (x for x in sys.argv[1:] if not x.startswith("--"))
    with processes.joined(
        coordinator_address=flags.get("coordinator_address"),
        num_processes=int(flags["num_processes"]) if flags else None,
        process_id=int(flags["process_id"]) if flags else None,
        peer_timeout=PEER_TIMEOUT,
    ) as should_stop:
        globals()[check](*arguments)
