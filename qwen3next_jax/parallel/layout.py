"""Checks whether a run fits a mesh, and how its arrays are sharded, before any allocation."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from qwen3next_jax.config import LINEAR, RunConfig, divisors, nearest
from qwen3next_jax.ops.delta_rule import CHUNK
from qwen3next_jax.parallel.mesh import ROWS, SLICES

# With more expert ways, a receive buffer for the worst case is many times as large as its load.
_EXACT_EXPERT_WAYS = 8
_LARGE = 1 << 20  # bytes; smaller arrays may be replicated


def check_fits(config: RunConfig, sizes: Mapping[str, int]) -> None:
    """Checks that the mesh divides every dimension of the run that it shards.

    Args:
      config: config of the run.
      sizes: sizes of the mesh axes.

    Raises:
      ValueError: if it does not; lists all such dimensions, with the nearest sizes that would work.
    """
    problems = list(_problems(config, sizes))
    if problems:
        raise ValueError("The run does not fit the mesh:\n  " + "\n  ".join(problems))


def _problems(config: RunConfig, sizes: Mapping[str, int]) -> Iterable[str]:
    m, t = config.model, config.train
    delta = LINEAR in m.mixers
    sparse = any(sparse for _, sparse in m.all_layers)
    columns = {
        "model.num_attention_heads": m.num_attention_heads,
        "model.linear_num_key_heads": delta and m.linear_num_key_heads,
        "model.vocab_size": m.vocab_size,
        "model.moe_intermediate_size": sparse and m.moe_intermediate_size,
        "model.shared_expert_intermediate_size": sparse and m.shared_expert_intermediate_size,
        "model.intermediate_size": not all(s for _, s in m.all_layers) and m.intermediate_size,
    }
    kv_heads = m.num_key_value_heads

    def kv_heads_work(ways: int) -> bool:
        # If there are fewer KV heads than devices along the axis, the heads are replicated.
        return kv_heads % ways == 0 or ways % kv_heads == 0

    yield from _indivisible(sizes, ("tensor",), columns)
    if not kv_heads_work(sizes["tensor"]):
        heads = m.num_attention_heads
        works = [w for w in range(1, heads + 1) if heads % w == 0 and kv_heads_work(w)]
        yield (
            f"model.num_key_value_heads={kv_heads} and mesh.tensor={sizes['tensor']} do not divide "
            f"one another; {nearest(works, sizes['tensor'])} would work"
        )
    yield from _indivisible(sizes, ("expert",), {"model.num_experts": sparse and m.num_experts})
    yield from _indivisible(sizes, SLICES, {"model.hidden_size": m.hidden_size})
    name = "train.global_batch_size"
    if t.gradient_accumulation_steps > 1:
        name += " / train.gradient_accumulation_steps"
    yield from _indivisible(sizes, ROWS, {name: t.micro_batch_size})
    if sizes["context"] > 1:
        # A chunk must lie on one device, and attention splits each stretch into two pieces.
        least, piece = (CHUNK, "the delta rule's chunk") if delta else (2, "attention's pieces")
        if t.sequence_length % (least * sizes["context"]):
            step = least * sizes["context"]
            works = [step * max(t.sequence_length // step, 1)]
            works.append(works[0] + step)
            chunks, rest = divmod(t.sequence_length, least)
            ways = [] if rest else divisors(chunks)
            yield (
                f"train.sequence_length={t.sequence_length} is not divisible by mesh.context="
                f"{sizes['context']} times {least} tokens, {piece}; a length of "
                f"{works[0]} or {works[1]} would work"
                + (f", or mesh.context={nearest(ways, sizes['context'])}" if ways else "")
            )
    if sparse and sizes["expert"] > _EXACT_EXPERT_WAYS and config.mesh.moe_buffer_factor == -1:
        yield (
            f"mesh.moe_buffer_factor=-1 makes room for {sizes['expert']} times an even load on "
            f"mesh.expert={sizes['expert']}; name a factor, such as 2.0, or use mesh.expert="
            f"{_EXACT_EXPERT_WAYS}"
        )


def _indivisible(
    sizes: Mapping[str, int], axes: tuple[str, ...], given: Mapping[str, int | bool]
) -> Iterable[str]:
    """Yields a message if the axes together do not divide all sizes.

    A size of 0 or False means that the run has no such dimension.
    """
    ways = math.prod(sizes[axis] for axis in axes)
    wrong = [name for name, size in given.items() if size and size % ways]
    if wrong:
        common = math.gcd(*(int(size) for size in given.values()))
        works = divisors(common)
        devices = math.prod(sizes.values())
        fitting = [w for w in works if devices % w == 0]
        # If only 1 fits the number of devices, suggest sizes for another number of devices.
        works = fitting if len(fitting) > 1 else works
        split = " x ".join(f"mesh.{axis}={sizes[axis]}" for axis in axes if sizes[axis] > 1)
        yield (
            f"{', '.join(f'{name}={given[name]}' for name in wrong)} "
            f"{'is' if len(wrong) == 1 else 'are'} not divisible by {split}; "
            f"{nearest(works, ways)}{' in all' if len(axes) > 1 else ''} would work"
        )


class _Placed(NamedTuple):
    """An array on a mesh: its bytes, a device's, and those of the latter that are copies."""

    line: str  # what `describe_layout` says of it
    size: int
    held: int
    copied: float


def check_copies(
    arrays: Iterable[tuple[str, Any]], sizes: Mapping[str, int], *, max_replicated: float
) -> None:
    """Checks that not too much of what a device holds is also held by others.

    Args:
      arrays: names and arrays, or `ShapeDtypeStruct`s with a sharding.
      sizes: sizes of the mesh axes.
      max_replicated: largest share of a device's bytes, in [0, 1], that may be copies of other
        devices' bytes. Copies along `data` and arrays below a mebibyte do not count.

    Raises:
      ValueError: if more is replicated; names the largest of these arrays.
    """
    placed = list(_placed(arrays, sizes))
    held, copied = sum(x.held for x in placed), sum(x.copied for x in placed)
    if copied > max_replicated * held:
        largest = sorted(placed, key=lambda x: x.copied, reverse=True)[:5]
        raise ValueError(
            f"{copied / held:.0%} of each device's {_mb(held)} are copies of what its neighbours "
            f"hold, more than mesh.max_replicated={max_replicated}; let the table in "
            "parallel/mesh.py split these, or raise mesh.max_replicated:\n  "
            + "\n  ".join(x.line for x in largest if x.copied > 0)
        )


def describe_layout(arrays: Iterable[tuple[str, Any]], sizes: Mapping[str, int]) -> str:
    """Describes how each large array is sharded: a line for each, and one with the totals.

    Args:
      arrays, sizes: as in `check_copies`.
    """
    placed = list(_placed(arrays, sizes))
    least = max(_LARGE, sum(x.size for x in placed) / 1000)  # a line for no less than a thousandth
    held, copied = sum(x.held for x in placed), sum(x.copied for x in placed)
    return "\n".join(
        [
            *(x.line for x in placed if x.size >= least),
            f"In all {_mb(held)} a device, of which {_mb(copied)} copies",
        ]
    )


def _placed(arrays: Iterable[tuple[str, Any]], sizes: Mapping[str, int]) -> Iterator[_Placed]:
    slices = math.prod(sizes.values()) // sizes["data"]
    for name, x in arrays:
        size, held = (
            math.prod(shape) * x.dtype.itemsize
            for shape in (x.shape, x.sharding.shard_shape(x.shape))
        )
        split = f"{x.dtype.name}{list(x.shape)} split {x.sharding.spec}"
        yield _Placed(
            line=f"{name}: {split}, {_mb(held)} a device",
            size=size,
            held=held,
            copied=held - size / slices if size >= _LARGE else 0,
        )


def _mb(size: int | float) -> str:
    return f"{size / 1e6:,.1f} MB"
