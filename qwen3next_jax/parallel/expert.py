"""Brings tokens to their experts and back: which row goes where, and no matrix product.

Each token has A experts, so M tokens make A · M assignments, first the first of every token, then
the second. Sorted by expert, these are the rows of a grouped matrix product. Each expert's rows
start at a multiple of `alignment`, with zero rows in the gaps. The plan holds the token of every
row and the row of every assignment, so that dispatch, combine and the gradients of both are
gathers: scatters are slow everywhere and serial on CPUs. Nothing is dropped. The experts multiply
their rows by the router's weights themselves, so that combining is a plain sum: then dispatch and
combine are each other's transposes, and a layer that is rematerialised need not return its rows a
second time.

Where experts are split over a mesh axis, the sorted rows travel to their experts' devices and back
(`apply_split_experts`). First the devices of the axis exchange how many rows each has for each
expert, a few integers, from which every device computes where every row lies on every device; there
rows are sorted by expert as well. The received rows must fit a buffer of fixed size. With a buffer
for the worst case nothing is dropped. With a smaller one, rows that do not fit are not sent: they
contribute zeros and are counted.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qwen3next_jax.ops.fresh_rows import fresh_rows
from qwen3next_jax.ops.platform import platform

Compute = Callable[[Float[Array, "R D"], Float[Array, "R"], Int[Array, "E"]], Float[Array, "R D"]]
_LANES = 128


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
      x: tokens.
      experts: of each token, its experts, in [0, num_experts).
      weights: of each token, its experts' weights.
      compute: maps rows sorted by expert, their weights, and the number of rows of each expert, to
        weighted rows. Rows between two experts' are zero and must stay finite.
      num_experts: E.
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
    """The same inside `shard_map`, each device of a mesh axis with experts and tokens of its own.

    Args:
      x, experts, weights, alignment: as `apply_experts` takes them, of this device's tokens; a
        token with `num_experts` for its experts, padding, has none and is sent nowhere.
      compute: as there, for this device's num_experts / n experts; rows behind the last expert's
        may be anything, there and in what it returns.
      num_experts: E, on all n devices of the axis together.
      axis: the mesh axis; device i has the experts from i · E / n on.
      buffer_factor: rows that a device can receive, as a multiple of the M · A that it gets when
        loads are even; -1 for the most that can ever come, n · M · min(A, E / n).
      exchange: "ragged" sends what there is to send and runs on TPU and GPU; "dense" pads it to the
        most that one device can have for another, and runs everywhere. The results are the same.

    Returns:
      As `apply_experts`, and how many of this device's assignments found no place.

    Raises:
      ValueError: for an unknown exchange, or experts that the axis cannot divide.
    """
    ways = jax.lax.axis_size(axis)
    if exchange not in ("ragged", "dense"):
        raise ValueError(f"{exchange=} is unknown; expected 'ragged' or 'dense'")
    if num_experts % ways:
        raise ValueError(f"{num_experts=} is not divisible by mesh axis {axis}={ways}")
    (M, D), A, local = x.shape, experts.shape[1], num_experts // ways
    most = M * min(A, local)  # a token's experts are distinct
    buffer = ways * most
    if buffer_factor > 0:
        buffer = min(buffer, math.ceil(buffer_factor * M * A))

    plan = _plan(experts, num_experts, 1)
    counts = jax.lax.all_gather(plan.group_sizes, axis).reshape(ways, ways, local)
    route = _route(counts, jax.lax.axis_index(axis), M * A, buffer, alignment)
    plan = plan._replace(kept=route.there[plan.row] < ways * len(route.origin))
    given = _Given(axis, exchange, M * A, len(route.origin), most)
    if D % _LANES == 0:
        # On a TPU a row is then whole tiles of memory; among others it would be a strip of many.
        x = x.reshape(M, -1, _LANES)
    rows = _send(_dispatch(x, plan), route, given).reshape(-1, D)
    rows = compute(rows, _send_weights(_dispatch_weights(weights, plan), route, given), route.sizes)
    return _combine(_return(rows.reshape(-1, *x.shape[1:]), route, given), plan).reshape(
        M, D
    ), route.dropped


class _Plan(NamedTuple):
    assignment: Int[Array, "R"]  # of each row, the index into [A · M]; A · M where there is none
    row: Int[Array, "A M"]  # of each assignment, its row
    group_sizes: Int[Array, "E"]  # rows of each expert, gaps included
    # Which assignments found a place; None: all did. If not None, there is one more row, which
    # belongs to no token. Coming back it is zero, and the assignments without a place read it:
    # selecting by a mask would cost more than adding up the rows.
    kept: Bool[Array, "A M"] | None = None


def _plan(experts, num_experts, alignment):
    # A TPU holds [M, A] in tiles that A fills poorly; to flatten it in this order takes far longer.
    flat = experts.T.reshape(-1)
    order = _order(flat, num_experts)  # assignments, sorted by expert
    counts = jnp.bincount(flat, length=num_experts)
    sizes = -(-counts // alignment) * alignment
    # Of each expert, its first row and its first place in `order`; then of what has no expert.
    first_row, first = (jnp.pad(jnp.cumsum(n), (1, 0)) for n in (sizes, counts))
    moved = first_row - first  # how far gaps move its rows
    rows = flat.size + min(num_experts, flat.size) * (alignment - 1)  # the worst case
    rows = -(-rows // alignment) * alignment
    if platform() == "cpu":
        # Scattering integers, which is slow elsewhere, is faster than sorting on a CPU. What is
        # scattered is also there for good: expressions of integers XLA would compute again for each
        # entry of every row that is gathered by them.
        ordered_row = jnp.arange(flat.size) + moved[flat[order]]
        row = _scatter(ordered_row, order, flat.size)
        assignment = _scatter(order, ordered_row, rows, empty=flat.size)
        return _Plan(assignment, row.reshape(experts.T.shape), sizes)

    rank, index = jnp.argsort(order, stable=False), jnp.arange(rows)
    if alignment == 1:  # no gaps: rows are the assignments as sorted
        assignment = jnp.where(index < first[-1], order, flat.size)
        return _Plan(assignment, rank.reshape(experts.T.shape), sizes)
    expert = _run_of(first_row[:-1], rows)
    taken = order[(index - moved[expert]).clip(max=flat.size - 1)]
    assignment = jnp.where(index < (first_row[:-1] + counts)[expert], taken, flat.size)
    return _Plan(assignment, (rank + moved[flat]).reshape(experts.T.shape), sizes)


def _order(experts, num_experts):
    """A stable argsort."""
    # As one integer, where expert and index fit in one, a CPU sorts them five times as fast.
    size = len(experts)
    if (num_experts + 1) * size > jnp.iinfo(jnp.int32).max:
        return jnp.argsort(experts, stable=True)
    return jnp.sort(experts * size + jnp.arange(size), stable=False) % size


def _scatter(values, places, size, *, empty=0):
    """Values to places, all different, of so many."""
    return jnp.full(size, empty, values.dtype).at[places].set(values, unique_indices=True)


@jax.custom_vjp
def _dispatch(x, plan):
    """The token of each row; zeros in gaps."""
    token = plan.assignment % len(x)
    if plan.kept is not None:
        return x.at[jnp.append(token, 0)].get(mode="clip")
    if len(plan.assignment) == plan.row.size:
        return x.at[token].get(mode="clip")
    return _take(x, jnp.where(plan.assignment < plan.row.size, token, len(x)))


@jax.custom_vjp
def _combine(rows, plan):
    """The sum of each token's rows; the transpose of `_dispatch`."""
    row = plan.row if plan.kept is None else jnp.where(plan.kept, plan.row, len(rows) - 1)
    gathered = rows.at[row].get(mode="clip")
    if platform() == "gpu":
        # Else it gathers number by number, inside of what adds them up.
        gathered = jax.lax.optimization_barrier(gathered)
    # Written out, a TPU adds them up as fast as it reads them; a reduction takes five times longer.
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
    """The weight of each row; zeros in gaps."""
    return _take(weights.T.reshape(-1), plan.assignment)


_dispatch_weights.defvjp(
    lambda weights, plan: (_dispatch_weights(weights, plan), plan),
    lambda plan, d_rows: (d_rows[plan.row].T, None),
)


def _take(x, index):
    """x[index], and zeros where the index lies beyond x."""
    return x.at[index].get(mode="fill", fill_value=0)


# Below: n devices, s a source of rows and d a destination, each in [0, n); j a device's own expert.


class _Given(NamedTuple):
    """The static arguments of the exchange: sizes that do not depend on the routing."""

    axis: str
    exchange: str
    rows: int  # of a source
    places: int  # of a destination
    most: int  # rows that one device can have for another


class _Route(NamedTuple):
    """Where the rows of this device, sorted by expert, lie on the others, and theirs here."""

    first: Int[Array, "n E"]  # of this device's rows, the first for each destination and expert
    sent: Int[Array, "n E"]  # and how many of them are sent,
    place: Int[Array, "n E"]  # to this place of the destination
    came: Int[Array, "n E"]  # rows that each source sends here for each expert,
    start: Int[Array, "n E"]  # to this place,
    origin_first: Int[Array, "n E"]  # from this place of its rows
    sizes: Int[Array, "E"]  # rows of each expert here, gaps included
    there: Int[Array, "R"]  # of each row, its place among those of all destinations
    origin: Int[Array, "S"]  # of each place, its row among those of all sources
    dropped: Int[Array, ""]


def _route(
    counts: Int[Array, "n n E"], me: Int[Array, ""], rows: int, buffer: int, alignment: int
) -> _Route:
    """From the rows of each source for each expert of each destination."""
    n, _, local = counts.shape
    # Sources take their places one after the other, each its rows in order, while there are any.
    sizes = counts.sum(2)
    room = jnp.clip(buffer - _starts(sizes, axis=0), 0, sizes)
    kept = jnp.minimum(jnp.cumsum(counts, axis=2), room[..., None])
    kept = jnp.diff(kept, axis=2, prepend=0)
    # A source's rows lie in order of expert; at the destination, an expert's in order of source.
    first = _starts(counts.reshape(n, -1), axis=1).reshape(counts.shape)
    groups = -(-kept.sum(0) // alignment) * alignment
    place = _starts(groups, axis=1) + _starts(kept, axis=0)
    places = buffer + min(local, buffer) * (alignment - 1)
    places = -(-places // alignment) * alignment

    everywhere = jnp.arange(n)[:, None]
    there = _follow(
        first[me], kept[me], place[me] + everywhere * places, size=rows, none=n * places
    )
    # Here pieces follow one another by expert, then by source.
    origin = _follow(
        place[:, me].T, kept[:, me].T, (first[:, me] + everywhere * rows).T,
        size=places, none=n * rows,
    )  # fmt: skip
    return _Route(
        first[me], kept[me], place[me], kept[:, me], place[:, me], first[:, me], groups[me],
        there, origin, (counts - kept)[me].sum(),
    )  # fmt: skip


def _follow(starts, sizes, there, *, size, none):
    """Of each of `size` places here, its place elsewhere; `none` where no piece lies.

    A piece of `sizes` places begins at `starts` here, in ascending order, and at `there` elsewhere.
    """
    starts, sizes, there = (x.reshape(-1) for x in (starts, sizes, there))
    index, piece = jnp.arange(size), _run_of(starts, size)
    return jnp.where(index < (starts + sizes)[piece], index + (there - starts)[piece], none)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _send(rows, route, given):
    """Rows sorted by expert to the devices of their experts, and there in that order again."""
    if given.exchange == "ragged":
        there = route.first, route.sent, route.place, route.came
        return _ragged(rows, fresh_rows(given.places, rows), there, given.axis)
    padded = _pad(rows, route.first[:, 0], route.sent.sum(1), given.most)
    padded = _all_to_all(padded, given.axis)
    source, row = jnp.divmod(route.origin, given.rows)
    index = source * given.most + row - _take(route.origin_first[:, 0], source)
    index = jnp.where(source < len(padded), index, padded.shape[0] * given.most)
    return _take(padded.reshape(-1, *rows.shape[1:]), index)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _return(rows, route, given):
    """Back to where they came from, and behind them a row of zeros.

    Those that found no place may come back as anything.
    """
    if given.exchange == "ragged":
        back = route.start, route.came, route.origin_first, route.sent
        fresh = fresh_rows(given.rows + 1, rows).at[-1].set(0)
        return _ragged(rows, fresh, back, given.axis)
    n = len(route.came)
    slot = jnp.arange(n)[:, None] * given.most + _starts(route.came, axis=1)
    index = _follow(slot, route.came, route.start, size=n * given.most, none=len(rows))
    padded = _take(rows, index).reshape(n, given.most, *rows.shape[1:])
    padded = _all_to_all(padded, given.axis)
    return _unpad(padded, route.first[:, 0], route.sent.sum(1), given.rows + 1)


# The way back is the transpose of the way there.
_send.defvjp(
    lambda rows, route, given: (_send(rows, route, given), route),
    lambda given, route, d_received: (_return(d_received, route, given), None),
)
_return.defvjp(
    lambda received, route, given: (_return(received, route, given), route),
    lambda given, route, d_rows: (_send(d_rows, route, given), None),
)


def _ragged(rows, out, moves, axis):
    first, sizes, place, came = (x.reshape(-1) for x in moves)
    return jax.lax.ragged_all_to_all(rows, out, first, sizes, place, came, axis_name=axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _send_weights(weights, route, given):
    """The same for one number a row: few enough that every device gets all of them."""
    return _take(jax.lax.all_gather(weights, given.axis, tiled=True), route.origin)


_send_weights.defvjp(
    lambda weights, route, given: (_send_weights(weights, route, given), route),
    lambda given, route, d_weights: (
        _take(jax.lax.all_gather(d_weights, given.axis, tiled=True), route.there),
        None,
    ),
)


def _all_to_all(x, axis):
    return jax.lax.all_to_all(x, axis, split_axis=0, concat_axis=0, tiled=True)


def _pad(rows, start, size, most):
    """Cuts out n runs of rows and pads each to `most`: [R, ...] → [n, most, ...]."""
    place = jnp.arange(most)
    index = jnp.where(place < size[:, None], start[:, None] + place, len(rows))
    return _take(rows, index)


def _unpad(padded, start, size, rows):
    """Puts n runs back to where they start among so many rows: [n, most, ...] → [R, ...]."""
    n, most = padded.shape[:2]
    index = _follow(start, size, jnp.arange(n) * most, size=rows, none=n * most)
    return _take(padded.reshape(n * most, *padded.shape[2:]), index)


def _run_of(starts, size):
    """Of each place in [0, size), the last run that starts there or before; starts ascend."""
    return _cumsum(jnp.zeros(size, jnp.int32).at[starts].add(1, mode="drop")) - 1


def _cumsum(x):
    """The cumulative sums of many integers; they must stay below 2**24."""
    # As a product. A TPU's compiler writes `jnp.cumsum` out, 128 additions of each entry.
    rows = jnp.pad(x, (0, -len(x) % _LANES)).reshape(-1, _LANES).astype(jnp.float32)
    before = jnp.triu(jnp.ones((_LANES, _LANES), jnp.float32))
    sums = jnp.dot(rows, before, precision=jax.lax.Precision.HIGHEST).astype(jnp.int32)
    if len(sums) > 1:
        sums += (_cumsum(sums[:, -1]) - sums[:, -1])[:, None]
    return sums.reshape(-1)[: len(x)]


def _starts(sizes, axis=0):
    return jnp.cumsum(sizes, axis) - sizes
