"""Dispatches tokens to their experts and combines the results; contains no matrix product.

Each token has A experts, so M tokens make A · M assignments, ordered by rank: first the first
expert of every token, then the second. Sorted by expert, these are the rows of a grouped matrix
product. Each expert's rows start at a multiple of `alignment`, with zero rows in the gaps. The plan
holds the token of every row and the row of every assignment, so that dispatch, combine and the
gradients of both are gathers: scatters are slow everywhere and serial on CPUs. Nothing is dropped.
The experts multiply their rows by the router's weights themselves, so that combining is a plain
sum. Dispatch and combine are then each other's transposes, and a rematerialised layer need not send
its rows back a second time.

If experts are sharded over a mesh axis, the sorted rows travel to their experts' devices and back
(`apply_split_experts`). First the devices of the axis exchange how many rows each has for each
expert, a few integers. From these every device computes the position of every row on every device,
where rows are sorted by expert as well. The received rows must fit into a buffer of fixed size.
With a buffer for the worst case nothing is dropped. With a smaller one, rows that do not fit are
not sent: they contribute zeros and are counted.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qwen3next_jax.ops.fresh_rows import fresh_rows
from qwen3next_jax.ops.pallas.tpu import LANES
from qwen3next_jax.ops.platform import platform
from qwen3next_jax.ops.shapes import pad_to_multiple

Compute = Callable[[Float[Array, "R D"], Float[Array, "R"], Int[Array, "E"]], Float[Array, "R D"]]


def apply_experts(
    x: Float[Array, "M D"],
    experts: Int[Array, "M A"],
    weights: Float[Array, "M A"],
    compute: Compute,
    *,
    num_experts: int,
    alignment: int = 1,
) -> Float[Array, "M D"]:
    """Returns Σ_a weights[m, a] · expert experts[m, a] of x_m.

    Args:
      x: hidden states of the tokens.
      experts: experts of each token, in [0, num_experts).
      weights: router's weight of each of these experts.
      compute: function that maps rows sorted by expert, their weights, and the number of rows of
        each expert to weighted rows. Gap rows between two experts' are zero and must stay finite.
      num_experts: number of experts E.
      alignment: each expert's number of rows is rounded up to a multiple of it.
    """
    plan = _plan(experts, num_experts, alignment)
    rows = compute(_dispatch(x, plan), _dispatch_weights(weights, plan), plan.group_sizes)
    return _combine(rows, plan)


def apply_split_experts(
    x: Float[Array, "M D"],
    experts: Int[Array, "M A"],
    weights: Float[Array, "M A"],
    compute: Compute,
    *,
    num_experts: int,
    axis: str,
    alignment: int = 1,
    buffer_factor: float = -1.0,
    exchange: str = "dense",
) -> tuple[Float[Array, "M D"], Int[Array, ""]]:
    """Applies experts that are sharded over a mesh axis; for use inside `shard_map`.

    It computes the function of `apply_experts`, for this device's tokens. In this docstring n is
    the size of the axis.

    Args:
      x, weights, alignment: arguments of `apply_experts`, for this device's tokens.
      experts: experts of each token, in [0, num_experts); padding tokens have `num_experts` for all
        of theirs, and are not sent.
      compute: function as in `apply_experts`, for this device's num_experts / n experts. Rows after
        the last expert's may hold anything, and so may its results for them.
      num_experts: number of experts E on all devices of the axis together, a multiple of n.
      axis: name of the mesh axis; device i has the E / n experts from i · E / n on.
      buffer_factor: number of rows that a device can receive, as a multiple of the M · A that it
        receives when loads are even; -1 for the worst case, n · M · min(A, E / n).
      exchange: "ragged" sends only existing rows and runs on TPU and GPU; "dense" pads them to the
        most that one device can have for another, and runs everywhere. The results are the same.

    Returns:
      Σ_a weights[m, a] · expert experts[m, a] of x_m, without the dropped assignments; and the
      number of this device's assignments that were dropped.

    Raises:
      ValueError: for an unknown exchange, or a number of experts that the axis does not divide.
    """
    axis_size = jax.lax.axis_size(axis)
    if exchange not in ("ragged", "dense"):
        raise ValueError(f"{exchange=} is unknown; expected 'ragged' or 'dense'")
    if num_experts % axis_size:
        raise ValueError(f"{num_experts=} is not divisible by mesh axis {axis}={axis_size}")
    (M, D), A, local = x.shape, experts.shape[1], num_experts // axis_size
    max_per_peer = M * min(A, local)  # a token's experts are distinct
    buffer = axis_size * max_per_peer
    if buffer_factor > 0:
        buffer = min(buffer, math.ceil(buffer_factor * M * A))

    plan = _plan(experts, num_experts, 1)
    counts = jax.lax.all_gather(plan.group_sizes, axis).reshape(axis_size, axis_size, local)
    route = _route(counts, jax.lax.axis_index(axis), M * A, buffer, alignment)
    capacity = len(route.source_of_slot)
    plan = plan._replace(kept=route.destination_of_row[plan.row] < axis_size * capacity)
    config = _ExchangeConfig(axis, exchange, M * A, capacity, max_per_peer)
    if D % LANES == 0:
        # A row of [M, D / 128, 128] fills whole memory tiles of a TPU; a row of [M, D] would be
        # spread over many tiles that it shares with other rows.
        x = x.reshape(M, -1, LANES)
    rows = _send(_dispatch(x, plan), route, config).reshape(-1, D)
    row_weights = _send_weights(_dispatch_weights(weights, plan), route, config)
    rows = compute(rows, row_weights, route.sizes)
    y = _combine(_return(rows.reshape(-1, *x.shape[1:]), route, config), plan)
    return y.reshape(M, D), route.dropped


class _Plan(NamedTuple):
    """Where each assignment's row is; rows are sorted by expert."""

    assignment: Int[Array, "R"]  # assignment of each row, index into [A · M]; A · M in gaps
    row: Int[Array, "A M"]  # row of each assignment
    group_sizes: Int[Array, "E"]  # number of rows of each expert, gaps included
    # Which assignments are not dropped; None: all. If it is given, the rows have one extra row at
    # the end, which belongs to no token; `_combine` finds zeros there, which dropped assignments
    # read. Selecting by a mask instead would cost more than adding up the rows.
    kept: Bool[Array, "A M"] | None = None


def _plan(experts, num_experts, alignment):
    # Assignments are ordered [A, M]: on a TPU [M, A] has poorly filled tiles, because A is small,
    # and flattening it in that order takes far longer.
    flat = experts.T.reshape(-1)
    order = _order(flat, num_experts)  # assignments, sorted by expert
    counts = jnp.bincount(flat, length=num_experts)
    if alignment == 1:  # no gaps: rows are the assignments as sorted, those without an expert last
        return _Plan(order, _inverse(order).reshape(experts.T.shape), counts)
    sizes = -(-counts // alignment) * alignment
    # First row and first index into `order` of each expert; the last entries are for assignments
    # without an expert.
    first_row, first = (jnp.pad(jnp.cumsum(n), (1, 0)) for n in (sizes, counts))
    shift = first_row - first  # by how much the gaps before an expert shift its rows
    rows = flat.size + min(num_experts, flat.size) * (alignment - 1)  # the worst case
    rows = -(-rows // alignment) * alignment
    if platform() == "cpu":
        # Scattering, which is slow elsewhere, also materialises the indices. XLA:CPU would fuse
        # integer expressions into the gathers that use them, and recompute them for each entry of
        # every gathered row.
        ordered_row = jnp.arange(flat.size) + shift[flat[order]]
        row = _scatter(ordered_row, order, flat.size)
        assignment = _scatter(order, ordered_row, rows, empty=flat.size)
        return _Plan(assignment, row.reshape(experts.T.shape), sizes)

    rank, index = _inverse(order), jnp.arange(rows)
    expert = _run_of(first_row[:-1], rows)
    taken = order[(index - shift[expert]).clip(max=flat.size - 1)]
    assignment = jnp.where(index < (first_row[:-1] + counts)[expert], taken, flat.size)
    return _Plan(assignment, (rank + shift[flat]).reshape(experts.T.shape), sizes)


def _inverse(order):
    """The inverse of a permutation."""
    if platform() == "cpu":  # where scattering integers is faster than sorting them
        return _scatter(jnp.arange(len(order)), order, len(order))
    return jnp.argsort(order, stable=False)


def _order(experts, num_experts):
    """Computes a stable argsort of integers in [0, num_experts]."""
    # If expert and index fit into one integer, a CPU sorts those integers five times as fast.
    size = len(experts)
    if (num_experts + 1) * size > jnp.iinfo(jnp.int32).max:
        return jnp.argsort(experts, stable=True)
    return jnp.sort(experts * size + jnp.arange(size), stable=False) % size


def _scatter(values, index, size, *, empty=0):
    """An array of `size` entries with values at distinct indices, and `empty` elsewhere."""
    return jnp.full(size, empty, values.dtype).at[index].set(values, unique_indices=True)


@jax.custom_vjp
def _dispatch(x, plan):
    """Gathers each row's token; rows in gaps are zero."""
    token = plan.assignment % len(x)
    if plan.kept is not None:
        return x.at[jnp.append(token, 0)].get(mode="clip")
    if len(plan.assignment) == plan.row.size:
        return x.at[token].get(mode="clip")
    return _take(x, jnp.where(plan.assignment < plan.row.size, token, len(x)))


@jax.custom_vjp
def _combine(rows, plan):
    """Sums each token's rows; the transpose of `_dispatch`."""
    row = plan.row if plan.kept is None else jnp.where(plan.kept, plan.row, len(rows) - 1)

    def take(index):
        return rows.at[index].get(mode="clip")

    # Cut from one gather, bfloat16 rows would take XLA:CPU five times as long.
    gathered = [take(index) for index in row] if platform() == "cpu" else take(row)
    if platform() == "gpu":
        # Without the barrier XLA:GPU fuses the gather into the sum and loads single numbers.
        gathered = jax.lax.optimization_barrier(gathered)
    # Unrolled, the sum runs at memory speed on a TPU; a reduction takes five times longer.
    total = gathered[0].astype(jnp.float32)
    for summand in gathered[1:]:
        total += summand.astype(jnp.float32)
    return total.astype(rows.dtype)


_dispatch.defvjp(
    lambda x, plan: (_dispatch(x, plan), plan),
    lambda plan, d_rows: (_combine(d_rows, plan), None),
)
_combine.defvjp(
    lambda rows, plan: (_combine(rows, plan), plan),
    lambda plan, d_x: (_dispatch(d_x, plan), None),
)


@jax.custom_vjp
def _dispatch_weights(weights, plan):
    """Gathers each row's weight; it is zero in gaps."""
    return _take(weights.T.reshape(-1), plan.assignment)


_dispatch_weights.defvjp(
    lambda weights, plan: (_dispatch_weights(weights, plan), plan),
    lambda plan, d_rows: (d_rows[plan.row].T, None),
)


def _take(x, index):
    """Computes x[index], with zeros where the index is out of bounds."""
    return x.at[index].get(mode="fill", fill_value=0)


# Below, n is the size of the mesh axis, and E the number of experts of one device. Each device has
# rows to send, sorted by expert, and a receive buffer of `capacity` slots. A run is the contiguous
# rows that one source sends to one expert.


class _ExchangeConfig(NamedTuple):
    """Static arguments of the exchange: sizes that do not depend on the routing."""

    axis: str
    exchange: str
    rows: int  # number of rows that each source has
    capacity: int  # number of slots that each destination has
    max_per_peer: int  # largest number of rows that one device can have for another


class _Route(NamedTuple):
    """How this device's rows map to slots of all devices, and all devices' rows to its slots."""

    first: Int[Array, "n E"]  # first of this device's rows for each destination and expert
    sent: Int[Array, "n E"]  # number of rows sent to each destination and expert
    slot: Int[Array, "n E"]  # first slot of these rows at the destination
    received: Int[Array, "n E"]  # number of rows received from each source for each expert
    received_slot: Int[Array, "n E"]  # first slot of these rows on this device
    received_first: Int[Array, "n E"]  # first of these rows among the source's rows
    sizes: Int[Array, "E"]  # number of this device's slots for each expert, gaps included
    destination_of_row: Int[Array, "R"]  # slot of each row, counted through all n devices' slots
    source_of_slot: Int[Array, "S"]  # row in each slot, counted through all n devices' rows
    dropped: Int[Array, ""]  # number of this device's rows that are not sent


def _route(
    counts: Int[Array, "n n E"], me: Int[Array, ""], rows: int, buffer: int, alignment: int
) -> _Route:
    """Computes the route of device `me`.

    For example, device 0 has the rows a a b d and device 1 A B B C C C, with experts a and b on
    device 0, c and d on device 1. Then counts = [[[2, 1], [0, 1]], [[1, 2], [3, 0]]]; the slots of
    device 0 receive a a A b B B and those of device 1 C C C d. On device 0 `sent` is
    [[2, 1], [0, 1]] from the rows `first` = [[0, 2], [3, 3]] to the slots [[0, 3], [0, 3]], and
    `received` is [[2, 1], [1, 2]] into the slots [[0, 3], [2, 4]].

    Args:
      counts: number of rows of each source (first axis) for each destination's experts.
      me: index of this device.
      rows: number of rows that each source has.
      buffer: number of rows that each destination can receive.
      alignment: each expert's slots start at a multiple of it.
    """
    n, _, local = counts.shape
    # Sources fill a destination's buffer one after another, each with its rows in order, until it
    # is full.
    sizes = counts.sum(2)
    room = jnp.clip(buffer - _starts(sizes, axis=0), 0, sizes)
    kept = jnp.minimum(jnp.cumsum(counts, axis=2), room[..., None])
    kept = jnp.diff(kept, axis=2, prepend=0)
    # A source's rows are in order of expert; at the destination, each expert's rows are in order of
    # source.
    first = _starts(counts.reshape(n, -1), axis=1).reshape(counts.shape)
    groups = -(-kept.sum(0) // alignment) * alignment
    slot = _starts(groups, axis=1) + _starts(kept, axis=0)
    capacity = buffer + min(local, buffer) * (alignment - 1)
    capacity = -(-capacity // alignment) * alignment

    device = jnp.arange(n)[:, None]
    destination_of_row = _gather_index(
        first[me], kept[me], slot[me] + device * capacity, size=rows, none=n * capacity
    )
    # Runs must ascend by slot: by expert, then by source.
    source_of_slot = _gather_index(
        slot[:, me].T,
        kept[:, me].T,
        (first[:, me] + device * rows).T,
        size=capacity,
        none=n * rows,
    )
    return _Route(
        first=first[me],
        sent=kept[me],
        slot=slot[me],
        received=kept[:, me],
        received_slot=slot[:, me],
        received_first=first[:, me],
        sizes=groups[me],
        destination_of_row=destination_of_row,
        source_of_slot=source_of_slot,
        dropped=(counts - kept)[me].sum(),
    )


def _gather_index(starts, sizes, targets, *, size, none):
    """The index that gathers runs into an array of `size` entries; `none` outside of all runs.

    Run i fills `sizes[i]` entries from `starts[i]` on, with entries from `targets[i]` on of the
    array that is gathered from. The starts ascend.
    """
    starts, sizes, targets = (x.reshape(-1) for x in (starts, sizes, targets))
    index, run = jnp.arange(size), _run_of(starts, size)
    return jnp.where(index < (starts + sizes)[run], index + (targets - starts)[run], none)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _send(rows, route, config):
    """Sends rows sorted by expert to their experts' devices, and sorts them by expert there."""
    if config.exchange == "ragged":
        runs = route.first, route.sent, route.slot, route.received
        return _ragged(rows, fresh_rows(config.capacity, rows), runs, config.axis)
    padded = _pad(rows, route.first[:, 0], route.sent.sum(1), config.max_per_peer)
    padded = _all_to_all(padded, config.axis)
    source, row = jnp.divmod(route.source_of_slot, config.rows)
    index = source * config.max_per_peer + row - _take(route.received_first[:, 0], source)
    index = jnp.where(source < len(padded), index, padded.shape[0] * config.max_per_peer)
    return _take(padded.reshape(-1, *rows.shape[1:]), index)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _return(rows, route, config):
    """Sends rows back to their sources, and appends a zero row there.

    The contents of dropped rows are undefined.
    """
    if config.exchange == "ragged":
        runs = route.received_slot, route.received, route.received_first, route.sent
        fresh = fresh_rows(config.rows + 1, rows).at[-1].set(0)
        return _ragged(rows, fresh, runs, config.axis)
    n = len(route.received)
    starts = jnp.arange(n)[:, None] * config.max_per_peer + _starts(route.received, axis=1)
    index = _gather_index(
        starts, route.received, route.received_slot, size=n * config.max_per_peer, none=len(rows)
    )
    padded = _take(rows, index).reshape(n, config.max_per_peer, *rows.shape[1:])
    padded = _all_to_all(padded, config.axis)
    return _unpad(padded, route.first[:, 0], route.sent.sum(1), config.rows + 1)


# `_send` and `_return` are each other's transposes.
_send.defvjp(
    lambda rows, route, config: (_send(rows, route, config), route),
    lambda config, route, d_received: (_return(d_received, route, config), None),
)
_return.defvjp(
    lambda received, route, config: (_return(received, route, config), route),
    lambda config, route, d_rows: (_send(d_rows, route, config), None),
)


def _ragged(rows, out, runs, axis):
    """Exchanges runs, given by their first rows, sizes, target slots and received sizes."""
    first, sizes, slot, received = (x.reshape(-1) for x in runs)
    return jax.lax.ragged_all_to_all(rows, out, first, sizes, slot, received, axis_name=axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _send_weights(weights, route, config):
    """Sends each row's weight; these are so few that every device gathers the weights of all."""
    return _take(jax.lax.all_gather(weights, config.axis, tiled=True), route.source_of_slot)


_send_weights.defvjp(
    lambda weights, route, config: (_send_weights(weights, route, config), route),
    lambda config, route, d_weights: (
        _take(jax.lax.all_gather(d_weights, config.axis, tiled=True), route.destination_of_row),
        None,
    ),
)


def _all_to_all(x, axis):
    return jax.lax.all_to_all(x, axis, split_axis=0, concat_axis=0, tiled=True)


def _pad(rows, start, size, length):
    """Extracts n runs of rows and pads each to `length`: [R, ...] → [n, length, ...]."""
    offset = jnp.arange(length)
    index = jnp.where(offset < size[:, None], start[:, None] + offset, len(rows))
    return _take(rows, index)


def _unpad(padded, start, size, rows):
    """Puts n padded runs back at their starts in an array of `rows` rows; the inverse of `_pad`."""
    n, length = padded.shape[:2]
    index = _gather_index(start, size, jnp.arange(n) * length, size=rows, none=n * length)
    return _take(padded.reshape(n * length, *padded.shape[2:]), index)


def _run_of(starts, size):
    """For each index in [0, size), the last run that starts at or before it; starts ascend."""
    return _cumsum(jnp.zeros(size, jnp.int32).at[starts].add(1, mode="drop")) - 1


def _cumsum(x):
    """The cumulative sums of many integers; they must stay below 2**24."""
    # A matrix product, because the TPU compiler unrolls `jnp.cumsum` to 128 additions per entry.
    rows = pad_to_multiple(x, LANES, axis=0).reshape(-1, LANES).astype(jnp.float32)
    before = jnp.triu(jnp.ones((LANES, LANES), jnp.float32))
    sums = jnp.dot(rows, before, precision=jax.lax.Precision.HIGHEST).astype(jnp.int32)
    if len(sums) > 1:
        sums += (_cumsum(sums[:, -1]) - sums[:, -1])[:, None]
    return sums.reshape(-1)[: len(x)]


def _starts(sizes, axis=0):
    """Where each run starts if runs of these sizes follow one another along the axis."""
    return jnp.cumsum(sizes, axis) - sizes
