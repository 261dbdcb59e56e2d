"""Brings tokens to their experts and back: which row goes where, and no matrix product.

Each token has A experts, so M tokens make M · A assignments. Sorted by expert they become the rows
of a grouped matrix product; each expert's rows start at a multiple of `alignment`, the gaps are
zero rows. Every row knows its token and every assignment its row, so dispatch, combine and the
gradients of both are gathers: scatters are slow everywhere and serial on CPUs. Nothing is dropped.
"""

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


def apply_used_experts(
    x: Float[Array, "M D"],
    experts: Int[Array, "M A"],
    weights: Float[Array, "M A"],
    compute: Callable[[Int[Array, ""]], Float[Array, "M D"]],
    *,
    num_experts: int,
) -> Float[Array, "M D"]:
    """The same for so few tokens that nothing is worth sorting; not differentiable.

    Each expert that any token uses is applied to all tokens, one expert after the other: what
    decoding waits for is the experts' weights, which are so read once and copied nowhere.

    Args:
      x, experts, weights, num_experts: as `apply_experts` takes them.
      compute: from an expert's number to what it makes of x.
    """
    chosen = experts[..., None] == jnp.arange(num_experts)
    share = (chosen * weights[..., None]).sum(1).astype(x.dtype)
    used = chosen.any((0, 1))
    order = jnp.argsort(~used)

    def visit(i, y):
        e = order[i]
        return y + share[:, e, None] * compute(e)

    return jax.lax.fori_loop(0, used.sum(), visit, jnp.zeros_like(x))


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
