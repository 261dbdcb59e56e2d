"""One optimizer step as a pure function: gradients over micro-batches, update, metrics.

Cross-entropy terms are sums over the step's labels divided by their number in the whole step, so
any number of micro-batches gives the update of the one big batch. The balance loss is not a sum
over tokens: with scope "global" each micro-batch is balanced against the loads of the step so far,
its own included, and the terms are averaged.

A step changes no parameter if its loss or gradient is not finite, or if tokens found no place at
their experts and `mesh.on_overflow` is "error". From then on no step changes one, because the host
notices only after it has dispatched the next step, and must still find the parameters from before,
to name what is wrong. The optimizer's state is not kept: nobody goes on from there.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Int

from qwen3next_jax.config import RunConfig
from qwen3next_jax.model.statistics import over_first_axis
from qwen3next_jax.training.diagnostics import layer_metrics, update_ratios
from qwen3next_jax.training.loss import Batch, count_labels, loss
from qwen3next_jax.training.norm import norm


class TrainState(NamedTuple):
    """All that a step changes."""

    step: Int[Array, ""]  # steps taken
    halted: Bool[Array, ""]  # something was not finite or overflowed; `step` was not taken
    params: nnx.State
    opt_state: Any  # of no more use once halted


def initial_state(params: nnx.State, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), jnp.zeros((), bool), params, optimizer.init(params))


def make_gradients(
    graph: nnx.GraphDef, config: RunConfig
) -> Callable[[nnx.State, Batch], tuple[nnx.State, dict[str, Array]]]:
    """Returns a function from parameters and a step's batch to gradients and metrics.

    Gradients are float32. Metrics: loss and its terms, tokens (labels of the next-token term) and,
    with experts, expert_load_max, the busiest expert's load over the mean load, the worst layer's,
    and dropped_share, of the assignments those without place; with `train.diagnostics` those of
    `training/diagnostics.py` by layer.
    """
    parts = config.train.gradient_accumulation_steps

    def micro_loss(params, micro_batch, counts, earlier):
        return loss(
            nnx.merge(graph, params),
            micro_batch,
            mtp_weight=config.train.mtp_loss_weight,
            z_weight=config.train.router_z_loss_weight,
            balance_scope=config.train.balance_scope,
            chunk=config.train.loss_chunk,
            counts=counts,
            earlier_assignments=earlier,
            router_share=1 / parts,
            observe=config.train.diagnostics,
        )

    def micro_gradients(params, micro_batch, counts, earlier):
        """Gradients, the assignments so far (None without experts), and metrics."""
        (value, metrics), grads = jax.value_and_grad(micro_loss, has_aux=True)(
            params, micro_batch, counts, earlier
        )
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        return grads, metrics.pop("assignments", None), {**metrics, "loss": value}

    def accumulated(params, batch, counts):
        """The same over all micro-batches of a step."""
        # Rows are dealt out in turn, so that each device's rows of every micro-batch are its own.
        micro_batches = jax.tree.map(
            lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch
        )

        def accumulate(carry, micro_batch):
            total, earlier = carry
            grads, assignments, metrics = micro_gradients(params, micro_batch, counts, earlier)
            return (jax.tree.map(jnp.add, total, grads), assignments), metrics

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        routed = sum(sparse for _, sparse in config.model.all_layers)
        no_loads = jnp.zeros((routed, config.model.num_experts)) if routed else None
        (grads, assignments), metrics = jax.lax.scan(accumulate, (zeros, no_loads), micro_batches)
        observed = metrics.pop("observed", None)
        combined = {} if observed is None else {"observed": over_first_axis(observed)}
        for name, x in metrics.items():
            # Loss terms of one step add up; the router's are means.
            combined[name] = x.mean() if name in ("balance_loss", "router_z_loss") else x.sum()
        return grads, assignments, combined

    def gradients(params, batch):
        counts = count_labels(batch, config.model.mtp_steps)
        if parts == 1:
            grads, assignments, metrics = micro_gradients(params, batch, counts, None)
        else:
            grads, assignments, metrics = accumulated(params, batch, counts)
        observed = metrics.pop("observed", None)
        metrics["tokens"] = (batch["loss_weights"] > 0).sum()
        if assignments is not None:
            mean = assignments.mean(-1)
            metrics["expert_load_max"] = (assignments.max(-1) / jnp.maximum(mean, 1)).max()
            total = jnp.maximum(assignments.sum(), 1)
            metrics["dropped_share"] = metrics["dropped_assignments"] / total
        if observed is not None:
            metrics |= layer_metrics(observed, assignments)
        return grads, metrics

    return gradients


def make_train_step(
    graph: nnx.GraphDef, optimizer: optax.GradientTransformation, config: RunConfig
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """Returns the step: from a state and a batch to the next state and metrics.

    Metrics are those of `make_gradients`, grad_norm (before clipping), halted and, with
    `train.diagnostics`, the updates over the parameters by part of the model.
    """
    gradients = make_gradients(graph, config)

    def train_step(state, batch):
        with jax.default_matmul_precision(config.precision.matmul):
            grads, metrics = gradients(state.params, batch)
        grad_norm = norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if config.train.diagnostics:
            zero_centered = config.model.zero_centered_norm
            metrics |= update_ratios(updates, state.params, zero_centered_norm=zero_centered)
        halted = state.halted | ~(jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm))
        if config.mesh.on_overflow == "error":
            halted |= metrics.get("dropped_assignments", 0) > 0
        # Moments are not chosen from old and new ones: XLA for CPUs would compute new ones twice,
        # for the choice and in the update, and copy the old ones first, as both read them.
        step, params = jax.tree.map(
            lambda new, old: jnp.where(halted, old, new),
            (state.step + 1, params),
            (state.step, state.params),
        )
        state = TrainState(step, halted, params, opt_state)
        return state, {**metrics, "grad_norm": grad_norm, "halted": halted}

    return train_step


def first_bad_parameter(
    graph: nnx.GraphDef, config: RunConfig, params: nnx.State, batch: Batch
) -> str:
    """Names the first parameter that is not finite, or whose gradient on this batch is not."""

    @jax.jit
    def finite(params, batch):
        grads, _ = make_gradients(graph, config)(params, batch)
        return jax.tree.map(lambda x: jnp.isfinite(x).all(), (params, grads))

    for what, flags in zip(("value", "gradient"), finite(params, batch), strict=True):
        for path, flag in nnx.to_flat_state(flags):
            if not flag[...]:
                return f"the {what} of {'/'.join(map(str, path))}"
    return "no single parameter (the loss alone)"
