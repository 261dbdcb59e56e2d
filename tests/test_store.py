"""Checkpoints: bit for bit, kept in number, whole after kills, and damage is noticed."""

import functools
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from launched import run, virtual_devices
from oracles import quick_jit
from several import big_state

from qwen3next_jax.checkpoint import store as store_module
from qwen3next_jax.checkpoint.store import (
    CheckpointStore,
    DamagedCheckpointError,
    Streamed,
    save_streamed,
)
from qwen3next_jax.parallel.names import named_leaves

ROOT = pathlib.Path(__file__).parents[1]


@functools.cache
def after_an_update(optimizer):
    """The optimizer's state by parameters, with moments that are not 0."""
    return quick_jit(lambda p: optimizer.update(p, optimizer.init(p), p)[1])


def make_state(seed=0, optimizer=optax.adamw(1e-3, mu_dtype=jnp.bfloat16)):  # noqa: B008
    rng = np.random.default_rng(seed)

    def draw(*shape, dtype=jnp.float32):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    params = {
        "embed": draw(64, 48),
        "layers": {0: {"w": draw(3, 8, 5, dtype=jnp.bfloat16)}},
        "gains": [jnp.float32(jnp.pi), draw(7)],
    }
    opt_state = after_an_update(optimizer)(params)
    odd = jnp.array([jnp.nan, -0.0, jnp.inf, 1e-40])
    return {
        "params": params,
        "optimizer": opt_state,
        "step": jnp.int32(seed),
        "odd": odd,
        "flags": jnp.array([True, False]),
    }


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (name, x), (_, y) in zip(named_leaves(a), named_leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()), name


def save_steps(directory, steps, keep=3):
    store = CheckpointStore(directory, keep)
    for step in steps:
        store.save(step, make_state(step), {"tokens": step * 100})
    store.close()


def test_state_and_extras_come_back_bit_for_bit(tmp_path):
    state, extras = make_state(), {"data": {"position": [1, 2], "name": "ü"}, "rate": 0.1}
    store = CheckpointStore(tmp_path / "new" / "checkpoints", keep=1)
    assert store.latest_step() is None
    store.save(5, state, extras)
    store.wait()
    assert store.latest_step() == 5
    got, got_extras = store.restore(5, abstract(state))
    assert got_extras == extras
    assert_same_bits(state, got)
    store.close()


def test_a_step_that_is_saved_anew_is_read_anew(tmp_path):
    for state in (make_state(1), make_state(2)):
        store = CheckpointStore(tmp_path / "checkpoints", keep=1)
        store.save(1, state, {})
        store.wait()
        assert_same_bits(state, store.restore(1, abstract(state))[0])
        store.close()
        shutil.rmtree(tmp_path / "checkpoints")


def test_flax_variables_and_plain_arrays_share_their_files(tmp_path):
    plain = {"a": {0: jnp.arange(6.0).reshape(2, 3)}, "b": jnp.ones(4, jnp.bfloat16)}
    flax_state = nnx.State(jax.tree.map(lambda x: nnx.Param(x, axes=("x",)), plain))
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, {"params": flax_state}, {})
    assert_same_bits({"params": plain}, store.restore_latest({"params": abstract(plain)})[1])
    got = store.restore_latest(abstract({"params": flax_state}))[1]
    assert_same_bits({"params": flax_state}, got)
    assert isinstance(got["params"]["b"], nnx.Param)
    store.close()


def test_arrays_get_the_shardings_asked_for(tmp_path):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, {"w": jnp.arange(8.0)}, {})
    wanted = {"w": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)}
    assert store.restore_latest(wanted)[1]["w"].sharding == sharding
    store.close()


def test_a_saved_buffer_may_be_donated_at_once(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    state = {"w": jnp.arange(1e6)}
    store.save(1, state, {})
    jax.jit(lambda x: {"w": 0 * x["w"]}, donate_argnums=0)(state)
    got = store.restore_latest({"w": jax.ShapeDtypeStruct((10**6,), jnp.float32)})[1]
    np.testing.assert_array_equal(got["w"], np.arange(1e6, dtype=np.float32))
    store.close()


def test_an_array_larger_than_what_is_written_at_a_time_is_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_WRITE_BYTES", 2**20)
    store = CheckpointStore(tmp_path, keep=1)
    state = {"w": jnp.arange(2**19, dtype=jnp.float32)}  # twice as large
    store.save(1, state, {})
    assert_same_bits(state, store.restore_latest(abstract(state))[1])
    store.close()


def test_the_newest_checkpoints_are_kept_and_found_again(tmp_path):
    save_steps(tmp_path, [10, 20, 30, 40], keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["30", "40"]
    reader = CheckpointStore(tmp_path)
    assert reader.latest_step() == 40
    step, state, extras = reader.restore_latest(abstract(make_state()))
    assert (step, extras) == (40, {"tokens": 4000})
    assert_same_bits(make_state(40), state)
    with pytest.raises(FileNotFoundError, match=r"step 10 in .*; steps there: 30, 40"):
        reader.restore(10, abstract(make_state()))
    with pytest.raises(ValueError, match="reading only"):
        reader.save(50, make_state(), {})


def test_saving_an_earlier_step_leaves_the_later_course(tmp_path):
    save_steps(tmp_path, [10, 20, 30])
    save_steps(tmp_path, [20])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "20"]


def test_the_best_stay_besides_the_newest(tmp_path):
    store = CheckpointStore(tmp_path, keep=1, keep_best=2)
    nan = float("nan")
    metrics = {0: nan, 1: 3.0, 2: 1.0, 3: None, 4: nan, 5: 2.0, 6: 4.0, 7: 5.0}
    for step, metric in metrics.items():
        store.save(step, make_state(step), {}, metric=metric)
    assert store.steps() == [7, 5, 2]
    store.close()
    # Another run goes on, and remembers.
    store = CheckpointStore(tmp_path, keep=1, keep_best=2)
    store.save(8, make_state(8), {}, metric=0.5)
    store.save(9, make_state(9), {})
    assert store.steps() == [9, 8, 2]
    assert store.metric(8) == 0.5
    assert store.metric(9) is None
    store.close()


def test_a_step_whose_index_is_damaged_is_none_of_the_best(tmp_path):
    store = CheckpointStore(tmp_path, keep=1, keep_best=1)
    store.save(1, {"w": jnp.ones(3)}, {}, metric=1.0)
    store.wait()
    (tmp_path / "1" / "index" / "metadata").write_text("{")
    assert store.metric(1) is None
    store.save(2, {"w": jnp.ones(3)}, {}, metric=2.0)
    assert store.steps() == [2]
    store.close()


def read_here(directory, step):
    wanted = abstract(big_state(0))
    store = CheckpointStore(directory)
    found, state, extras = store.restore_latest(wanted)
    store.close()
    assert (found, extras) == (step, {"step": step})
    assert_same_bits(state, big_state(step))


def test_processes_save_together_and_agree_on_which_checkpoint_is_good(tmp_path):
    # Two processes of two devices, four ways to lay the arrays; then one process of one device.
    # The newest checkpoint is one that process 1 alone cannot read: both take the one before.
    assert run("checkpoints", tmp_path) == [["took 10"]] * 2
    read_here(tmp_path, 20)


@pytest.mark.slow
def test_a_checkpoint_of_eight_devices_is_restored_on_any_others(tmp_path):
    def on(devices, *command):
        subprocess.run(
            [sys.executable, "tests/several.py", *map(str, command)],
            cwd=ROOT,
            check=True,
            env=os.environ | {"XLA_FLAGS": virtual_devices(devices)},
        )

    on(8, "save", tmp_path, 5)
    for devices in (8, 4, 2):
        on(devices, "restore", tmp_path, 5)
    for processes, devices in ((4, 1), (2, 4)):
        run("restore", tmp_path, 5, processes=processes, devices=devices)
    read_here(tmp_path, 5)


@pytest.mark.parametrize(
    "reason", ["No space left on device [28]", "Disk quota exceeded [122]", "File too large [27]"]
)
def test_a_full_disk_is_told_as_one(reason, tmp_path, monkeypatch):
    # As tensorstore tells of it, from a save that was let go.
    def full():
        raise ValueError(f"RESOURCE_EXHAUSTED: Error writing file: {reason}")

    store = CheckpointStore(tmp_path, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(store._manager, "wait_until_finished", full)
        what = "The disk is full" if "space" in reason else reason.split(" [")[0]
        with pytest.raises(OSError, match=f"{what}; the checkpoints before are whole"):
            store.wait()
    store.close()


def check_for_a_minute(store):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        store.check()


def test_a_save_that_failed_is_told_when_asked_and_leaves_the_one_before(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, {"w": jnp.zeros(8)}, {"step": 1})
    store.wait()
    store.check()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))  # as a full disk
    try:
        noise = jax.random.normal(jax.random.key(0), (2**18,))  # does not compress
        store.save(2, {"w": noise}, {"step": 2})
        with pytest.raises(OSError, match="File too large; the checkpoints before are whole"):
            check_for_a_minute(store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    store.save(3, {"w": jnp.ones(8)}, {"step": 3})
    assert store.steps() == [3]
    store.close()


def test_a_directory_without_checkpoints_says_so(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    with pytest.raises(FileNotFoundError, match=f"no checkpoint in {tmp_path}"):
        store.restore_latest({})
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*absent"):
        CheckpointStore(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


def test_another_state_is_refused_naming_every_difference(tmp_path):
    save_steps(tmp_path, [1])
    store = CheckpointStore(tmp_path)
    other = abstract(make_state())
    other["params"]["embed"] = jax.ShapeDtypeStruct((64, 50), jnp.float32)
    other["params"]["layers"][0]["w"] = jax.ShapeDtypeStruct((3, 8, 5), jnp.float32)
    other["params"]["new"] = jax.ShapeDtypeStruct((), jnp.float32)
    del other["flags"]
    with pytest.raises(ValueError, match="holds another state") as error:
        store.restore_latest(other)
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        "params/embed: expected float32[64, 50], found float32[64, 48]",
        "params/layers/0/w: expected float32[3, 8, 5], found bfloat16[3, 8, 5]",
        "params/new: missing",
        "flags: unexpected",
    ]


def test_a_part_of_the_state_can_be_read_alone(tmp_path):
    save_steps(tmp_path, [1])
    store = CheckpointStore(tmp_path)
    params = {"params": make_state(1)["params"]}
    got, _ = store.restore(1, abstract(params), partial=True)
    assert_same_bits(params, got)
    with pytest.raises(ValueError, match=r"odd: unexpected"):
        store.restore(1, abstract(params))


def test_a_part_that_is_read_alone_is_compared_with_its_checksums(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, keep=1)
    with monkeypatch.context() as patch:  # as if other bits had been saved
        patch.setattr(store_module, "_checksums", lambda arrays: dict.fromkeys(arrays, 1))
        store.save(1, {"v": jnp.ones(3), "w": jnp.ones(3)}, {})
        store.wait()
    with pytest.raises(DamagedCheckpointError, match=r"changed since they were saved: w$"):
        store.restore(1, {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}, partial=True)
    store.close()


def remove(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x55
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [remove, cut, flip])
def test_any_harm_to_the_newest_checkpoint_is_named_or_harmless(tmp_path, harm):
    save_steps(tmp_path / "good", [10, 20])
    files = [path for path in (tmp_path / "good" / "20").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    noticed = []
    for number, file in enumerate(files):
        directory = tmp_path / str(number)
        shutil.copytree(tmp_path / "good", directory)
        harm(directory / file.relative_to(tmp_path / "good"))
        store = CheckpointStore(directory)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step, state, extras = store.restore_latest(abstract(make_state()))
        # Whichever it took, it is right; some of Orbax's files are not needed to read.
        assert_same_bits(make_state(step), state)
        assert extras == {"tokens": step * 100}
        if step == 10:
            noticed.append(file)
            assert f"the checkpoint {directory / '20'} is damaged" in str(caught[0].message)
        store.close()
    assert largest in noticed


def test_training_goes_on_past_a_damaged_checkpoint(tmp_path):
    save_steps(tmp_path, [10, 20])
    remove(next((tmp_path / "20").rglob("manifest.ocdbt")))
    store = CheckpointStore(tmp_path, keep=2)
    with pytest.warns(UserWarning, match=f"{tmp_path / '20'} is damaged"):
        assert store.restore_latest(abstract(make_state()))[0] == 10
    for step in (15, 20):
        store.save(step, make_state(step), {})
    store.wait()
    assert_same_bits(make_state(20), store.restore_latest(abstract(make_state()))[1])
    store.close()


def test_a_step_deleted_while_it_is_read_gives_way_to_a_newer_one(tmp_path):
    save_steps(tmp_path, [10], keep=1)
    reader, saved = CheckpointStore(tmp_path), [10]

    def read(step, until):
        if step < until:  # the run goes on, and keeps but its newest
            saved.append(saved[-1] + 10)
            save_steps(tmp_path, saved[-1:], keep=1)
        return reader.restore(step, abstract(make_state()))[0]

    with pytest.warns(UserWarning, match="was deleted while it was read"):
        assert_same_bits(make_state(30), reader.newest_good(lambda step: read(step, until=30)))
    with (
        pytest.warns(UserWarning, match="was deleted while it was read"),
        pytest.raises(FileNotFoundError, match="deletes its checkpoints before they are read"),
    ):
        reader.newest_good(lambda step: read(step, until=1000))


def test_when_all_are_damaged_it_is_an_error(tmp_path):
    save_steps(tmp_path, [10, 20])
    for file in tmp_path.glob("*/index/metadata"):
        file.unlink()
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(DamagedCheckpointError, match=f"all checkpoints in {tmp_path} are damaged"),
    ):
        CheckpointStore(tmp_path).restore_latest(abstract(make_state()))


# Kills writers of steps 1, 2, 3, ... at random moments; each state is known from its step. A writer
# is a fork of a process that has the imports done and no thread running yet, so that it starts at
# once. After each kill it prints the last step that is known to be begun, and waits for a line.
KILLER = textwrap.dedent("""
    import os, random, signal, sys, time
    import jax.numpy as jnp
    from qwen3next_jax.checkpoint.store import CheckpointStore

    directory, kills = sys.argv[1], int(sys.argv[2])

    def write_for_ever(pipe):
        store = CheckpointStore(directory, keep=2)
        step = store.latest_step() or 0
        while True:
            step += 1
            store.save(step, {"w": jnp.full((300, 1000), step, jnp.float32)}, {"step": step})
            os.write(pipe, b"%d " % step)

    rng = random.Random(kills)
    for _ in range(kills):
        begun, into = os.pipe()
        writer = os.fork()
        if writer == 0:
            write_for_ever(into)
        os.close(into)
        told = os.read(begun, 1000)
        time.sleep(rng.uniform(0.0, 0.6))
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        while more := os.read(begun, 1000):
            told += more
        os.close(begun)
        print(told.split()[-1].decode(), flush=True)
        sys.stdin.readline()
""")


def check_after_kill(directory, begun):
    store = CheckpointStore(directory)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing half-written is taken for a checkpoint
        wanted = {"w": jax.ShapeDtypeStruct((300, 1000), jnp.float32)}
        step, state, extras = store.restore_latest(wanted)
    # Saving waits for the save before, so all but the last two begun are there.
    assert begun - 1 <= step <= begun + 1
    assert extras == {"step": step}
    np.testing.assert_array_equal(state["w"], np.full((300, 1000), step))
    store.close()


@pytest.mark.parametrize("kills", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_a_kill_while_saving_leaves_whole_checkpoints_only(tmp_path, kills):
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, {"w": jnp.full((300, 1000), 1.0)}, {"step": 1})
    store.close()
    with subprocess.Popen(
        [sys.executable, "-c", KILLER, str(tmp_path), str(kills)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as killer:
        for _ in range(kills):
            check_after_kill(tmp_path, int(killer.stdout.readline()))
            killer.stdin.write("go on\n")
            killer.stdin.flush()
    # The next save clears away what the last writer left half-written.
    store = CheckpointStore(tmp_path, keep=2)
    store.save(10**6, {"w": jnp.ones(3)}, {})
    store.close()
    assert all(path.name.isdigit() for path in tmp_path.iterdir())


def test_orbax_is_silent_at_the_info_level_of_absl(tmp_path):
    script = textwrap.dedent("""
        from absl import app, logging
        import jax.numpy as jnp
        from qwen3next_jax.checkpoint.store import CheckpointStore

        def main(argv):
            store = CheckpointStore(argv[1], keep=1)
            store.save(1, {"w": jnp.ones(3)}, {})
            store.close()
            logging.info("our own line")

        app.run(main)
    """)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), "--verbosity=0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},  # JAX reports platforms it looks for in vain
    )
    [line] = done.stderr.splitlines()
    assert "our own line" in line


def test_the_index_names_arrays_as_the_model_does(tmp_path):
    save_steps(tmp_path, [1])
    index = json.loads((tmp_path / "1" / "index" / "metadata").read_text())
    assert index["arrays"]["params/layers/0/w"][:2] == [[3, 8, 5], "bfloat16"]
    assert "optimizer/0/mu/layers/0/w" in index["arrays"]
    assert index["extras"] == {"tokens": 100}


# Prints the peak of memory over what there was before, less what restoring is to leave there.
MEASURE = textwrap.dedent("""
    import sys
    import jax, jax.numpy as jnp, numpy as np
    from qwen3next_jax.checkpoint import store as store_module
    from qwen3next_jax.checkpoint.store import CheckpointStore

    def status(key):
        lines = open("/proc/self/status").read().splitlines()
        return int(next(x for x in lines if x.startswith(key)).split()[1]) / 1024

    store_module._WRITE_BYTES = 2**26
    count, directory = int(sys.argv[1]), sys.argv[2]
    names, shape = [f"x{i}" for i in range(count)], (8, 1024, 1024)
    draw = np.random.default_rng(0).standard_normal
    if sys.argv[3] == "save":
        state = {name: jnp.asarray(draw(shape, np.float32)) for name in names}
    else:
        state = {name: jax.ShapeDtypeStruct(shape, np.float32) for name in names}
    store = CheckpointStore(directory, keep=1)
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # sets the peak back
    if sys.argv[3] == "save":
        store.save(1, state, {})
        store.wait()
        print(status("VmHWM") - before)
    else:
        store.restore(1, state)
        print(status("VmHWM") - before - 32 * count)
""")


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_saving_and_restoring_take_memory_for_parts_not_for_the_whole(tmp_path):
    def peak(count, what):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(count), str(tmp_path / str(count)), what],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        return float(done.stdout)

    # Arrays of 32 MiB, 0.25 and 1 GiB in all. Saving has two of them on their way, and as much
    # encoded; reading has one and 64 MiB of decoded chunks. Threads, the allocator keep some.
    for count in (8, 32):
        for what in ("save", "restore"):
            extra = peak(count, what)
            print(f"{what} {32 * count} MiB: {extra:.0f} MiB besides")
            assert extra < 384, (count, what)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(store_module, "_CHUNK_BYTES", 2**21)
    monkeypatch.setattr(store_module, "_COMMIT_BYTES", 2**22)


def large_arrays():
    rng = np.random.default_rng(0)
    layers = rng.standard_normal((3, 4, 128, 2, 1025), np.float32)  # an expert of 1 MiB and a bit
    return {
        "params/layers": layers.astype(jnp.bfloat16),
        "params/experts": layers,
        "params/embed": rng.standard_normal((1500, 700), np.float32),
        "step": np.asarray(7, np.int32),
    }


def test_what_is_saved_as_a_stream_is_restored_like_the_rest(tmp_path, small_chunks):
    arrays, largest = large_arrays(), 0

    def streamed(array):
        def read(block):
            nonlocal largest
            values = np.asarray(array[block])
            largest = max(largest, values.nbytes)
            return values

        return Streamed(array.shape, array.dtype, read)

    save_streamed(tmp_path, 5, {name: streamed(x) for name, x in arrays.items()}, {"from": "here"})
    assert 2**20 < largest <= 2**21
    store = CheckpointStore(tmp_path)
    wanted = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}
    step, got, extras = store.restore_latest(wanted)
    assert (step, extras) == (5, {"from": "here"})
    assert_same_bits(got, arrays)
    store.close()


def test_a_saved_array_is_read_in_chunks_of_a_layer_and_an_expert(tmp_path, small_chunks):
    arrays = large_arrays()
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, arrays, {})
    store.wait()
    described, _ = store.describe(1)
    assert described == {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in arrays.items()}
    for name, array in arrays.items():
        got = np.zeros_like(array)
        for block, values in store.read_blocks(1, name):
            assert values.nbytes <= 2**21
            if name == "params/experts":
                assert values.shape == (1, 1, *array.shape[2:])
            got[block] = values
        assert got.tobytes() == array.tobytes()
    store.close()


@pytest.mark.parametrize("damage", [remove, cut, flip])
def test_damage_is_noticed_when_reading_in_chunks(damage, tmp_path):
    save_steps(tmp_path, [1])
    files = (f for f in (tmp_path / "1" / "state").rglob("*") if f.is_file())
    damage(max(files, key=lambda f: f.stat().st_size))
    store = CheckpointStore(tmp_path)
    names = store.describe(1)[0]
    with pytest.raises(DamagedCheckpointError, match=r"1 is damaged: "):
        [list(store.read_blocks(1, name)) for name in names]
    store.close()
