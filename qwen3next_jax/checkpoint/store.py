"""A run's checkpoints, written atomically and verified by checksums when they are read.

Orbax writes each step beside its final place and renames it once complete, so a killed run leaves
no incomplete step. Renaming does not protect from later damage: missing or truncated files are
noticed when they are read, but flipped bits are not. So each step also holds an index with the
shape, dtype and checksum of each array, and the index's own SHA-256. The index also tells a damaged
checkpoint from one of another model, and what differs.

Arrays are stored in a flat dict, named by `leaf_name`, so that the files depend neither on the
classes that hold the state (optax's NamedTuples, Flax's variables) nor on its sharding. Large ones
are stored in chunks of at most 16 MiB, cut along layers and experts first, so that a checkpoint
larger than memory can be written and read chunk by chunk.

All processes of a run make the same calls. Each writes and reads what its own devices hold, in one
shared directory, and all agree first on which steps there are and whether a step is damaged.
"""

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import logging
import math
import os
import pathlib
import shutil
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from qwen3next_jax.parallel.mesh import read_array
from qwen3next_jax.parallel.names import named_leaves
from qwen3next_jax.parallel.processes import exchange


def _worth_a_line(record: logging.LogRecord) -> bool:
    # At absl's INFO level, the default of its applications, Orbax writes some sixty lines a save,
    # and of one that fails three hundred: tracebacks of an error that the store raises anyway.
    of_orbax = "/orbax/" in record.pathname
    return not (of_orbax and (record.levelno < logging.WARNING or record.exc_info))


def _not_about_orbax(record: logging.LogRecord) -> bool:
    frames = traceback.extract_tb(record.exc_info[2]) if record.exc_info else []
    return not any("/orbax/checkpoint/" in frame.filename for frame in frames)


logging.getLogger("absl").addFilter(_worth_a_line)
logging.getLogger("asyncio").addFilter(_not_about_orbax)


_CHUNK_BYTES = 2**24
_COMMIT_BYTES = 2**25
# Limit on a process's bytes in flight to the disk; raised to twice the largest shard of an array
# where that is more.
_WRITE_BYTES = 2**28
# After how many checkpoints that the run deleted while they were being read a reader gives up.
_DELETED = 3

Block = tuple[slice, ...]
Result = TypeVar("Result")


class DamagedCheckpointError(RuntimeError):
    """A checkpoint is there but cannot be read, or holds other bits than were saved."""


@dataclasses.dataclass(frozen=True)
class Streamed:
    """An array that is computed block by block while it is saved, by `read`."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Block], np.ndarray]

    @property
    def size(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes it has."""
        return self.size * self.dtype.itemsize


class CheckpointStore:
    """The checkpoints in one directory, each in a folder named after its step."""

    def __init__(
        self, directory: str | pathlib.Path, keep: int | None = None, *, keep_best: int = 0
    ):
        """Opens the directory, and makes it where needed if `keep` is given.

        Args:
          directory: path of a directory that holds only checkpoints.
          keep: how many of the newest steps to keep; None: open for reading only, which is safe
            while a run writes.
          keep_best: how many steps with the lowest metric to keep in addition.

        Raises:
          FileNotFoundError: the directory does not exist and is opened for reading only.
        """
        self.directory, self._keep = pathlib.Path(directory).absolute(), keep
        writing = keep is not None
        if writing:
            self.directory.mkdir(parents=True, exist_ok=True)
        elif not self.directory.is_dir():
            raise FileNotFoundError(f"no checkpoint in {self.directory}")
        self._keep_best, self._in_flight = keep_best, _WRITE_BYTES
        self._manager = self._make_manager()

    def save(
        self, step: int, state: Any, extras: Mapping[str, Any], *, metric: float | None = None
    ) -> None:
        """Starts to save; returns once the state is copied, so that its buffers may be donated.

        Deletes the steps from `step` on, if any: they are left from before the run was resumed from
        an earlier checkpoint.

        Args:
          step: names the checkpoint.
          state: a pytree of arrays, none of size 0.
          extras: a JSON object; process 0's is saved.
          metric: the number by which `keep_best` chooses, lower being better.

        Raises:
          ValueError: the store is open for reading only.
          Exception: whatever an earlier save failed with.
        """
        if self._keep is None:
            raise ValueError(f"{self.directory} is open for reading only; give `keep` to save")
        self.wait()
        for later in [s for s in self.steps() if s >= step]:
            self._manager.delete(later)
        arrays = {name: jnp.asarray(x) for name, x in named_leaves(state)}
        self._raise_limit(arrays.values())
        index = _signed_index(arrays, _checksums(arrays), extras, metric)
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(arrays, save_args=_save_args(arrays)),
            index=ocp.args.JsonSave(index),
        )
        with self._failures_told():
            self._manager.save(step, args=items, force=True)

    def wait(self) -> None:
        """Waits until all saves are complete; raises the error of one that failed."""
        with self._failures_told():
            self._manager.wait_until_finished()

    def check(self) -> None:
        """Raises the error of a save that has failed by now; does not wait for one under way."""
        # Not by the manager's `check_for_errors`: an error that it raises is gone, so the thread
        # that completes the save would take that for good and delete the checkpoint before it.
        if not self._manager.is_saving_in_progress():
            self.wait()

    def steps(self) -> list[int]:
        """All complete steps, damaged or not, the newest first."""
        self.wait()
        return exchange(sorted(self._manager.all_steps(), reverse=True))[0]

    def metric(self, step: int) -> float | None:
        """The metric that a step was saved with; None without one, or if its index is damaged."""
        try:
            return self._read_index(step).get("metric")
        except (OSError, ValueError):
            return None

    def describe(self, step: int) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, Any]]:
        """The shapes and dtypes of a checkpoint's arrays, by name, and its extras.

        Raises:
          FileNotFoundError: there is no such checkpoint.
          DamagedCheckpointError: its index is damaged.
        """
        index = self._index(step)
        arrays = {
            name: jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))
            for name, (shape, dtype, _) in index["arrays"].items()
        }
        return arrays, index["extras"]

    def read_blocks(self, step: int, name: str) -> Iterator[tuple[Block, np.ndarray]]:
        """Reads one array a chunk at a time; yields each chunk with its index in the array.

        Raises:
          DamagedCheckpointError: its files are damaged; after the last chunk, if its bits are.
        """
        total = 0
        try:
            array = self._open(step, name)
            for block in _blocks(array.shape, array.chunk_layout.read_chunk.shape):
                values = array[block].read().result()
                total += _bit_sum(values)
                yield block, values
                del values
        except ValueError as error:
            raise self._damaged(step, _first_line(name, error)) from None
        if total % 2**32 != self._index(step)["arrays"][name][2]:
            raise self._damaged(step, f"changed since they were saved: {name}")

    def latest_step(self) -> int | None:
        """The newest complete step, damaged or not; None where there is none."""
        return max(self.steps(), default=None)

    def restore(
        self, step: int, abstract_state: Any, *, partial: bool = False
    ) -> tuple[Any, dict[str, Any]]:
        """Reads one checkpoint.

        Args:
          step: a saved step.
          abstract_state: the state's structure with jax.ShapeDtypeStructs for leaves. Arrays get
            their shardings; without one they are on the default device, see `read_array`.
          partial: whether the checkpoint may hold more, such as an optimizer's state.

        Returns:
          The state, its arrays bit for bit as saved, and the extras.

        Raises:
          FileNotFoundError: there is no such checkpoint.
          ValueError: the checkpoint is of another state; names each array that differs.
          DamagedCheckpointError: its files are damaged.
        """
        index = self._index(step)
        wanted = dict(named_leaves(abstract_state))
        problems = list(_differences(wanted, index["arrays"], partial))
        if problems:
            raise ValueError(
                f"{self.directory / str(step)} holds another state:\n  " + "\n  ".join(problems)
            )
        # One array at a time, so that beyond the arrays on the devices only one shard of one array,
        # and a few chunks, are in memory.
        arrays = self._agreed(
            step, lambda: {name: self._read_array(step, name, x) for name, x in wanted.items()}
        )
        sums = _checksums(arrays)
        changed = [name for name in wanted if sums[name] != index["arrays"][name][2]]
        if changed:
            raise self._damaged(step, f"changed since they were saved: {', '.join(changed)}")
        leaves = [arrays[name] for name in wanted]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), index["extras"]

    def restore_latest(self, abstract_state: Any) -> tuple[int, Any, dict[str, Any]]:
        """Reads the newest good checkpoint; warns of each damaged one it passes over.

        Args:
          abstract_state: see `restore`.

        Returns:
          The step, its state and its extras.

        Raises:
          FileNotFoundError: there is no checkpoint.
          ValueError: the newest undamaged one is of another state.
          DamagedCheckpointError: there are checkpoints, and all are damaged.
        """
        return self.newest_good(lambda step: (step, *self.restore(step, abstract_state)))

    def newest_good(self, make: Callable[[int], Result]) -> Result:
        """Calls `make` with the newest step, and after damage with the next older one.

        A live run may also delete a step while it is read; then a newer one is tried.

        Raises:
          FileNotFoundError: there is no checkpoint, or each was deleted before it was read.
          DamagedCheckpointError: there are checkpoints, and all are damaged.
        """
        tried, deleted = set(), 0
        while deleted < _DELETED:
            if self._keep is None:
                self._manager.reload()
            if not (steps := self.steps()):
                raise FileNotFoundError(f"no checkpoint in {self.directory}")
            if not (untried := [step for step in steps if step not in tried]):
                raise DamagedCheckpointError(f"all checkpoints in {self.directory} are damaged")
            tried.add(step := untried[0])
            try:
                return make(step)
            except DamagedCheckpointError as error:
                gone = exchange(not (self.directory / str(step)).exists())[0]
                problem = f"{self.directory / str(step)} was deleted while it was read"
                warnings.warn(f"{problem if gone else error}\nTrying another one.", stacklevel=3)
                deleted += gone
        raise FileNotFoundError(
            f"the run in {self.directory} deletes its checkpoints before they are read; let it "
            "keep more of them (train.keep_checkpoints), or read one when it has ended"
        )

    def close(self) -> None:
        """Waits for saves and frees the store's resources."""
        with self._failures_told():
            self._manager.close()

    @contextlib.contextmanager
    def _failures_told(self) -> Iterator[None]:
        try:
            with _full_disk_told("the checkpoints before are whole", self.directory):
                yield
        except Exception:
            # What was written of a step that failed may be what fills the disk.
            if self._keep is not None and jax.process_index() == 0:
                for unfinished in self.directory.glob("*.orbax-checkpoint-tmp*"):
                    shutil.rmtree(unfinished, ignore_errors=True)
            raise

    def _make_manager(self) -> ocp.CheckpointManager:
        together = ocp.options.MultiprocessingOptions(
            # Naming all processes makes them synchronise through the coordinator, not the devices.
            active_processes=set(range(jax.process_count()))
        )
        keep = self._keep
        retention = None if keep is None else _Retention(keep, self._keep_best, self.metric)
        return _Manager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                create=False,
                cleanup_tmp_directories=keep is not None,
                multiprocessing_options=together,
                preservation_policy=retention,
            ),
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(
                    save_concurrent_gb=self._in_flight / 10**9,  # type: ignore[arg-type]
                    multiprocessing_options=together,
                ),
                "index": ocp.JsonCheckpointHandler(multiprocessing_options=together),
            },
        )

    def _raise_limit(self, arrays: Iterable[jax.Array]) -> None:
        """Raises the limit of bytes in flight to twice the largest part of these arrays.

        Orbax refuses to write a part that is larger than the limit.
        """
        largest = max(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in arrays)
        if 2 * largest >= self._in_flight:
            self._in_flight = 2 * largest + 1
            self._manager.close()
            self._manager = self._make_manager()

    def _index(self, step: int) -> dict[str, Any]:
        if step not in (steps := self.steps()):
            there = ", ".join(map(str, reversed(steps))) or "none"
            raise FileNotFoundError(
                f"no checkpoint of step {step} in {self.directory}; steps there: {there}"
            )
        return self._agreed(step, lambda: self._read_index(step))

    def _read_index(self, step: int) -> dict[str, Any]:
        index = json.loads((self.directory / str(step) / "index" / "metadata").read_text())
        if not isinstance(index, dict) or index.pop("sha256", None) != _sha256(index):
            raise ValueError("its index changed since it was saved")
        return index

    def _read_array(self, step: int, name: str, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        try:
            array = self._open(step, name)
            if (array.shape, array.dtype.numpy_dtype) != (wanted.shape, wanted.dtype):
                raise ValueError(f"{array.dtype.name}{list(array.shape)} is not what was saved")
            return read_array(
                wanted.shape, wanted.sharding, lambda block: array[block].read().result()
            )
        except ValueError as error:
            raise ValueError(_first_line(name, error)) from None

    def _open(self, step: int, name: str) -> ts.TensorStore:
        state = self.directory / str(step) / "state"
        kvstore = {
            "driver": "ocdbt",
            "base": {"driver": "file", "path": f"{state}/"},
            "path": f"{name}/",
        }
        # A cache of its own, because a shared one would miss that a step was saved again.
        cache = ts.Context({"cache_pool": {"total_bytes_limit": 2**26}})
        return ts.open({"driver": "zarr", "kvstore": kvstore}, read=True, context=cache).result()

    def _agreed(self, step: int, read: Callable[[], Result]) -> Result:
        """Returns `read()`; raises in all processes if it fails in one of them."""
        harm = None
        try:
            result = read()
        except (OSError, ValueError) as error:
            harm = str(error).partition("\n")[0]
        for process, told in enumerate(exchange(harm)):
            if told is not None:
                where = f" (read by process {process})" if jax.process_count() > 1 else ""
                raise self._damaged(step, told + where)
        return result

    def _damaged(self, step: int, why: str) -> DamagedCheckpointError:
        return DamagedCheckpointError(
            f"the checkpoint {self.directory / str(step)} is damaged: {why}"
        )


class _Manager(ocp.CheckpointManager):
    """Orbax's manager without its preemption handling, which `processes.joined` does.

    At each save Orbax would report the step to JAX, and process 0 once more when the files are
    written. By then the run may be steps ahead, and some processes may have passed the step that
    JAX picks for all of them to stop at.
    """

    def reached_preemption(self, step: int) -> bool:
        """Never: only the steps that `save` is called with are saved."""
        return False


@contextlib.contextmanager
def _full_disk_told(message: str, directory: pathlib.Path) -> Iterator[None]:
    """Converts TensorStore's error for a full disk or quota, or too large a file, to an OSError."""
    try:
        yield
    except Exception as error:
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            if (reason := os.strerror(number)) in str(error):
                what = "The disk is full" if number == errno.ENOSPC else reason
                raise OSError(number, f"{what}; {message}", str(directory)) from error
        raise


class _Retention(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the newest steps and those with the lowest metric."""

    def __init__(self, newest: int, best: int, metric: Callable[[int], float | None]):
        self._newest, self._best, self._metric = newest, best, metric

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax asks this of all steps, the one just saved included, in rising order."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        stay = steps[-self._newest :]
        if self._best:
            stay += _best_first(steps, self._metric)[: self._best]
        return [step in stay for step in steps]


def save_streamed(
    directory: str | pathlib.Path,
    step: int,
    arrays: Mapping[str, Streamed],
    extras: Mapping[str, Any],
) -> None:
    """Saves arrays that may be larger than memory, as `CheckpointStore.save` would.

    The index is written last: until this returns the checkpoint counts as damaged, so the caller
    should write to a hidden directory and rename it.

    Args:
      directory: path of a directory, new or with only checkpoints in it.
      step: the checkpoint's number.
      arrays: arrays by leaf name.
      extras: a JSON object.
    """
    sums = dict.fromkeys(arrays, 0)

    def summed(name: str, array: Streamed) -> Streamed:
        def read(block: Block) -> np.ndarray:
            values = array.read(block)
            sums[name] = (sums[name] + _bit_sum(values)) % 2**32
            return values

        return dataclasses.replace(array, read=read)

    leaves = {name: summed(name, array) for name, array in arrays.items()}
    registry = ocp.type_handlers.create_type_handler_registry(
        (Streamed, _StreamedHandler()), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    handlers = {
        "state": ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
        "index": ocp.JsonCheckpointHandler(),
    }
    directory = pathlib.Path(directory).absolute()
    with contextlib.closing(
        ocp.CheckpointManager(
            directory,
            # Synchronous, so that an interrupt ends it.
            options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False),
            item_handlers=handlers,
        )
    ) as manager:
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(leaves, save_args=_save_args(leaves)),
            index=ocp.args.JsonSave({}),
        )
        with _full_disk_told("nothing of it is kept", directory):
            manager.save(step, args=items, force=True)
    path = directory / str(step) / "index" / "metadata"
    path.write_text(json.dumps(_signed_index(arrays, sums, extras)))


class _StreamedHandler(ocp.type_handlers.NumpyHandler):
    """Lets Orbax save a `Streamed` array; it is read back like any other."""

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> Any:
        """Writes all blocks of all arrays."""
        batch = _Batch()
        try:
            for value, info, arg in zip(values, infos, args, strict=True):
                await info.await_path_creation()
                spec = ocp.type_handlers.get_json_tspec_write(
                    info,
                    use_ocdbt=info.is_ocdbt_checkpoint,
                    global_shape=value.shape,
                    local_shape=value.shape,
                    dtype=value.dtype,
                    process_index=jax.process_index(),
                    arg=arg,
                )
                array = await ts.open(
                    ts.Spec(spec), create=True, open=True, context=info.ts_context
                )
                for block in _blocks(value.shape, array.chunk_layout.write_chunk.shape):
                    batch.write(array[block], value.read(block))
            batch.commit()
        finally:
            batch.settle()
        return []


class _Batch:
    """Blocks that are committed together, as each commit rewrites the index of all chunks."""

    def __init__(self):
        self._transaction, self._bytes = ts.Transaction(), 0

    def write(self, target: Any, values: np.ndarray) -> None:
        """Adds a block; first commits the earlier ones if together they would be too large."""
        if self._bytes + values.nbytes > _COMMIT_BYTES:
            self.commit()
            self._transaction, self._bytes = ts.Transaction(), 0
        target.with_transaction(self._transaction).write(values).copy.result()
        self._bytes += values.nbytes

    def commit(self) -> None:
        """Waits until all added blocks are on disk."""
        self._transaction.commit_async().result()

    def settle(self) -> None:
        """Aborts uncommitted writes; nothing is written after this returns."""
        self._transaction.abort()
        self._transaction.future.exception()


def _save_args(arrays: Mapping[str, Any]) -> dict[str, ocp.SaveArgs]:
    """Small arrays are one chunk; of large ones, each layer and each expert is at least one."""

    def leading(x: Any) -> tuple[int, ...]:
        if x.nbytes <= _CHUNK_BYTES:
            return ()
        rests = (math.prod(x.shape[axis + 1 :]) for axis in range(len(x.shape)))
        axes = itertools.takewhile(lambda rest: rest * x.dtype.itemsize >= 2**20, rests)
        return tuple(range(len(list(axes))))

    return {
        name: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=leading(x))
        for name, x in arrays.items()
    }


def _blocks(shape: tuple[int, ...], chunk: Any) -> Iterator[Block]:
    """Cuts an array into chunks; those at the ends may be smaller."""
    ranges = [
        [slice(i, min(i + step, size)) for i in range(0, size, step)]
        for size, step in zip(shape, chunk or (), strict=True)  # None for a scalar
    ]
    return itertools.product(*ranges)


def _bit_sum(values: np.ndarray) -> int:
    """Σ of the elements' bits, modulo 2³²; see `_checksum`."""
    bits = np.ascontiguousarray(values).view(f"uint{8 * values.dtype.itemsize}")
    return int(bits.sum(dtype=np.uint32))


def _differences(
    wanted: Mapping[str, Any], index: Mapping[str, Any], partial: bool
) -> Iterable[str]:
    for name, x in wanted.items():
        if name not in index:
            yield f"{name}: missing"
            continue
        shape, dtype, _ = index[name]
        if (tuple(shape), dtype) != (x.shape, x.dtype.name):
            yield f"{name}: expected {x.dtype.name}{list(x.shape)}, found {dtype}{shape}"
    if not partial:
        yield from (f"{name}: unexpected" for name in index if name not in wanted)


def _best_first(steps: Iterable[int], metric: Callable[[int], float | None]) -> list[int]:
    """The steps that have a finite metric, the lowest first."""
    scored = [(x, s) for s in steps if (x := metric(s)) is not None and math.isfinite(x)]
    return [step for _, step in sorted(scored)]


def _first_line(name: str, error: Exception) -> str:
    return f"{name}: {str(error).partition(chr(10))[0]}"


def _signed_index(
    arrays: Mapping[str, Any],
    sums: Mapping[str, int],
    extras: Mapping[str, Any],
    metric: float | None = None,
) -> dict[str, Any]:
    """The index of a step with these arrays, their checksums and extras; and a hash of it."""
    entries = {name: [list(x.shape), x.dtype.name, sums[name]] for name, x in arrays.items()}
    index = {"arrays": entries, "extras": dict(extras), "metric": metric}
    return {**index, "sha256": _sha256(index)}


def _sha256(index: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps(index))  # as JSON will be read back, with all keys strings
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _checksums(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    # One at a time: the virtual devices of XLA:CPU share its threads, and concurrent sums over
    # sharded arrays deadlock.
    return {name: int(_checksum(x)) for name, x in arrays.items()}


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """Σ of the elements' bits, modulo 2³²: the same however the array is sharded."""
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, np.dtype(f"uint{8 * x.dtype.itemsize}"))
    return bits.sum(dtype=jnp.uint32)
