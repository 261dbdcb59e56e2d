"""Brings tokens to their experts and back: which row goes where, and no matrix product.

Each token has A experts, so M tokens make M · A assignments. Sorted by expert they become the rows
of a grouped matrix product; each expert's rows start at a multiple of `alignment`, the gaps are
zero rows. Every row knows its token and every assignment its row, so dispatch, combine and the
gradients of both are gathers: scatters are slow everywhere and serial on CPUs. Nothing is dropped.

Where the experts are split over a mesh axis, the sorted rows travel to their experts' devices and
back (`apply_split_experts`). All devices of the axis first tell each other how many rows they have
for which expert, a few integers; from then on every device can compute where each row lies on each
other one. What a device receives must fit a buffer of fixed size. With one for the worst case
nothing is dropped; in a smaller one, rows for which no place is left are not sent, count as zeros,
and are counted.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def apply_experts(
    x: Float[Array, "M D"],
    experts: Int[Array, "M A"],
    weights: Float[Array, "M A"],
    compute: Callable[[Float[Array, "R D"], Int[Array, "E"]], Float[Array, "R D"]],
    *,
    num_experts: int,
    alignment: int = 1,
) -> Float[Array, "M D"]:
    """Returns Σ_a weights[m, a] · compute(x_m, for expert experts[m, a]).

    Args:
      x: tokens.
      experts: of each token, its experts, in [0, num_experts).
      weights: of each token, its experts' weights.
      compute: maps rows sorted by expert, and the number of rows of each expert, to rows. Rows
        that belong to no token are zero and must stay finite.
      num_experts: E.
      alignment: of what each expert's number of rows is made a multiple.
    """
    plan = _plan(experts, num_experts, alignment)
    rows = compute(_dispatch(x, plan), plan.group_sizes)
    return _combine(rows, weights, plan)


def apply_split_experts(
    x: Float[Array, "M D"],
    experts: Int[Array, "M A"],
    weights: Float[Array, "M A"],
    compute: Callable[[Float[Array, "R D"], Int[Array, "E"]], Float[Array, "R D"]],
    *,
    num_experts: int,
    axis: str,
    alignment: int = 1,
    buffer_factor: float = -1.0,
    exchange: str = "dense",
) -> tuple[Float[Array, "M D"], Int[Array, ""]]:
    """The same inside `shard_map`, each device of a mesh axis with experts and tokens of its own.

    Args:
      x, experts, weights, alignment: as `apply_experts` takes them, of this device's tokens.
      compute: maps rows sorted by expert to rows, for this device's num_experts / n experts.
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
    (M, A), local = experts.shape, num_experts // ways
    most = M * min(A, local)  # a token's experts are distinct
    buffer = ways * most
    if buffer_factor > 0:
        buffer = min(buffer, math.ceil(buffer_factor * M * A))

    plan = _plan(experts, num_experts, 1)
    counts = jax.lax.all_gather(plan.group_sizes, axis).reshape(ways, ways, local)
    route = _route(counts, jax.lax.axis_index(axis), buffer)
    given = (axis, exchange, M * A, buffer, most)
    received = _send(_dispatch(x, plan), route, given)
    sort = _sort_by_expert(route.kept, buffer, alignment)
    rows = compute(_permute(received, sort.place, sort.row), sort.group_sizes)
    received = _permute(rows, sort.row, sort.place)
    return _combine(_return(received, route, given), weights, plan), route.dropped


class _Plan(NamedTuple):
    assignment: Int[Array, "R"]  # of each row, the index into [M · A]; M · A where there is none
    row: Int[Array, "M A"]  # of each assignment, its row
    group_sizes: Int[Array, "E"]  # rows of each expert, gaps included


def _plan(experts, num_experts, alignment):
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)  # assignments, sorted by expert
    rank = jnp.argsort(order)  # where each assignment went
    counts = jnp.bincount(flat, length=num_experts)
    sizes = -(-counts // alignment) * alignment
    # Of each expert, its first row and its first place in `order`.
    first_row, first = jnp.cumsum(sizes) - sizes, jnp.cumsum(counts) - counts
    row = first_row[flat] + rank - first[flat]

    rows = flat.size + min(num_experts, flat.size) * (alignment - 1)  # the worst case
    index = jnp.arange(-(-rows // alignment) * alignment)
    expert = jnp.searchsorted(first_row + sizes, index, side="right").clip(max=num_experts - 1)
    place = index - first_row[expert]
    taken = order[(first[expert] + place).clip(max=flat.size - 1)]
    assignment = jnp.where(place < counts[expert], taken, flat.size)
    return _Plan(assignment, row.reshape(experts.shape), sizes)


@jax.custom_vjp
def _dispatch(x, plan):
    return _take(x, plan.assignment // plan.row.shape[1])


def _dispatch_backward(plan, d_rows):
    return d_rows[plan.row].sum(1), None


_dispatch.defvjp(lambda x, plan: (_dispatch(x, plan), plan), _dispatch_backward)


@jax.custom_vjp
def _combine(rows, weights, plan):
    # float32 inside: A products are summed.
    return jnp.einsum("mad,ma->md", rows[plan.row], weights).astype(rows.dtype)


def _combine_backward(residuals, d_out):
    rows, weights, plan = residuals
    token = plan.assignment // plan.row.shape[1]
    d_rows = _take(d_out, token) * _take(weights.reshape(-1), plan.assignment)[:, None]
    d_weights = jnp.einsum("mad,md->ma", rows[plan.row], d_out)
    return d_rows.astype(rows.dtype), d_weights.astype(weights.dtype), None


_combine.defvjp(lambda *args: (_combine(*args), args), _combine_backward)


def _take(x, index):
    """x[index], and zeros where the index lies beyond x."""
    return x.at[index].get(mode="fill", fill_value=0)


# Below: n devices, s a source of rows and d a destination, each in [0, n); j a device's own expert.


class _Route(NamedTuple):
    """Where the rows of this device, sorted by expert, lie on the others, and theirs here."""

    first: Int[Array, "n"]  # of this device's rows, the first for each destination
    sent: Int[Array, "n"]  # and how many of them are sent,
    place: Int[Array, "n"]  # to this place of the destination's buffer
    came: Int[Array, "n"]  # rows that each source sends here,
    start: Int[Array, "n"]  # to this place of our buffer,
    origin: Int[Array, "n"]  # from this place of its rows
    kept: Int[Array, "n E"]  # of what each source sends here, how much is for which expert
    dropped: Int[Array, ""]


def _route(counts: Int[Array, "n n E"], me: Int[Array, ""], buffer: int) -> _Route:
    """From the rows of each source for each expert of each destination."""
    sizes = counts.sum(2)
    first = _starts(sizes, axis=1)
    start = _starts(sizes, axis=0).clip(max=buffer)
    sent = jnp.minimum(sizes, buffer - start)
    kept = jnp.minimum(jnp.cumsum(counts[:, me], axis=1), sent[:, me, None])
    kept = jnp.diff(kept, axis=1, prepend=0)
    return _Route(
        first[me], sent[me], start[me], sent[:, me], start[:, me], first[:, me], kept,
        (sizes - sent)[me].sum(),
    )  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _send(rows, route, given):
    """Rows sorted by expert, [M · A, D], to the buffers of their experts' devices."""
    axis, exchange, _, buffer, most = given
    if exchange == "ragged":
        out = jnp.zeros((buffer, rows.shape[1]), rows.dtype)
        return jax.lax.ragged_all_to_all(
            rows, out, route.first, route.sent, route.place, route.came, axis_name=axis
        )
    return _unpad(_all_to_all(_pad(rows, route.first, route.sent, most), axis),
                  route.start, route.came, buffer)  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _return(received, route, given):
    """Buffers back to where the rows came from; zeros for those that found no place."""
    axis, exchange, rows, _, most = given
    if exchange == "ragged":
        out = jnp.zeros((rows, received.shape[1]), received.dtype)
        return jax.lax.ragged_all_to_all(
            received, out, route.start, route.came, route.origin, route.sent, axis_name=axis
        )
    return _unpad(_all_to_all(_pad(received, route.start, route.came, most), axis),
                  route.first, route.sent, rows)  # fmt: skip


# The way back is the transpose of the way there.
_send.defvjp(
    lambda rows, route, given: (_send(rows, route, given), route),
    lambda given, route, d_received: (_return(d_received, route, given), None),
)
_return.defvjp(
    lambda received, route, given: (_return(received, route, given), route),
    lambda given, route, d_rows: (_send(d_rows, route, given), None),
)


def _all_to_all(x, axis):
    return jax.lax.all_to_all(x, axis, split_axis=0, concat_axis=0, tiled=True)


def _pad(rows, start, size, most):
    """Cuts out n runs of rows and pads each to `most`: [R, D] → [n, most, D]."""
    place = jnp.arange(most)
    index = jnp.where(place < size[:, None], start[:, None] + place, len(rows))
    return _take(rows, index)


def _unpad(padded, start, size, rows):
    """Puts n runs back to where they start among so many rows: [n, most, D] → [R, D]."""
    n, most, D = padded.shape
    run = _run_of(start, rows)
    place = jnp.arange(rows) - start[run]
    index = jnp.where(place < size[run], run * most + place, n * most)
    return _take(padded.reshape(n * most, D), index)


class _Sort(NamedTuple):
    place: Int[Array, "R"]  # of each row sorted by expert, its place in the buffer
    row: Int[Array, "S"]  # of each place in the buffer, its row; both one too far for none
    group_sizes: Int[Array, "E"]


def _sort_by_expert(kept: Int[Array, "n E"], buffer: int, alignment: int) -> _Sort:
    """A buffer holds source after source, each sorted by expert; now expert after expert."""
    n, E = kept.shape
    counts = kept.sum(0)
    sizes = -(-counts // alignment) * alignment
    rows = buffer + min(E, buffer) * (alignment - 1)
    rows = -(-rows // alignment) * alignment
    in_buffer = _starts(kept.reshape(-1)).reshape(n, E)
    in_rows = _starts(sizes) + _starts(kept, axis=0)

    def moves(size, start, there, pieces, none):
        """Of so many places, where to in the other order; both orders by their pieces' starts."""
        piece = _run_of(start, size)
        offset = jnp.arange(size) - start[piece]
        return jnp.where(offset < pieces[piece], there[piece] + offset, none)

    flat_rows, flat_places, flat_kept = (x.T.reshape(-1) for x in (in_rows, in_buffer, kept))
    place = moves(rows, flat_rows, flat_places, flat_kept, none=buffer)
    flat_rows, flat_places, flat_kept = (x.reshape(-1) for x in (in_rows, in_buffer, kept))
    row = moves(buffer, flat_places, flat_rows, flat_kept, none=rows)
    return _Sort(place, row, sizes)


def _run_of(starts, size):
    """Of each place in [0, size), the last run that starts there or before; starts ascend."""
    return jnp.cumsum(jnp.zeros(size, jnp.int32).at[starts].add(1, mode="drop")) - 1


def _starts(sizes, axis=0):
    return jnp.cumsum(sizes, axis) - sizes


@jax.custom_vjp
def _permute(x, index, inverse):
    """x[index], where inverse[index[i]] = i; zeros where there is none."""
    return _take(x, index)


_permute.defvjp(
    lambda x, index, inverse: (_take(x, index), inverse),
    lambda inverse, d_out: (_take(d_out, inverse), None, None),
)
