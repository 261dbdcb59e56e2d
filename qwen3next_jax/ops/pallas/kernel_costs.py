"""Adds cost estimates to kernels of libraries that have none.

A compiled program contains no times of kernels, only the costs that their authors state
(`pallas_call(cost_estimate=...)`). Without an estimate the compiler schedules the kernel as if it
were free, and `qwen3next_jax.plan` counts it as free. For kernels without one, this module inserts
estimates into the traced program.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun


def stating(function: Callable, costs: Sequence[pl.CostEstimate]) -> Callable:
    """Adds cost estimates to the kernels that a function calls.

    Args:
      function: function of pytrees of arrays. The result cannot be differentiated, so this must be
        the derivative if that is needed.
      costs: estimate of each kernel, in the order of the calls.

    Returns:
      A function that computes the same. It raises a ValueError if the function does not call as
      many kernels as there are costs.
    """

    def stated(*args: Any) -> Any:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        left = iter(costs)
        try:
            jaxpr = _stating(closed.jaxpr, left)
        except StopIteration:
            raise ValueError(f"more kernels are called than the {len(costs)} expected") from None
        if (unused := len(list(left))) != 0:
            raise ValueError(f"{unused} of the {len(costs)} kernels expected are not called")
        outs = jaxpr_as_fun(ClosedJaxpr(jaxpr, closed.consts))(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), outs)

    return stated


def _stating(jaxpr: Jaxpr, costs: Iterator[pl.CostEstimate]) -> Jaxpr:
    eqns = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            params = {**eqn.params, "cost_estimate": next(costs)}
        else:
            params = {name: _inside(value, costs) for name, value in eqn.params.items()}
        eqns.append(eqn.replace(params=params))
    return jaxpr.replace(eqns=eqns)


def _inside(value: Any, costs: Iterator[pl.CostEstimate]) -> Any:
    if isinstance(value, ClosedJaxpr):
        return ClosedJaxpr(_stating(value.jaxpr, costs), value.consts)
    if isinstance(value, Jaxpr):
        return _stating(value, costs)
    return value
