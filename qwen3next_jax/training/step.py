"""One optimizer step as a pure function: gradients over micro-batches, update, metrics.

The losses of a step's micro-batches are averaged. Their cross-entropy terms are sums over labels,
divided by how many a micro-batch has on average rather than by its own number, so any number of
micro-batches gives the update of the one big batch. The balance loss is not a sum over tokens: with
scope "global" each micro-batch is balanced against the loads of the step so far, its own included.

A step is halted, that is, it changes no parameter, if its loss or gradient is not finite, or if
assignments were dropped and `mesh.on_overflow` is "error". All later steps are halted as well: the
host notices only after it has dispatched the next step, and needs the parameters from before to
name the one at fault. The optimizer's state is not preserved, since no run resumes from there.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Int

from qwen3next_jax.config import RunConfig
from qwen3next_jax.model.statistics import combine_parts
from qwen3next_jax.parallel.names import matching_names, named_leaves
from qwen3next_jax.training.diagnostics import layer_metrics, update_ratios
from qwen3next_jax.training.loss import Batch, count_labels, loss
from qwen3next_jax.training.norm import norm


class TrainState(NamedTuple):
    """The arrays that a step updates."""

    step: Int[Array, ""]  # number of steps taken
    halted: Bool[Array, ""]  # whether this or an earlier step was halted
    params: nnx.State
    opt_state: Any  # invalid once halted


def initial_state(
    params: nnx.State, optimizer: optax.GradientTransformation, config: RunConfig
) -> TrainState:
    """The state before the first step."""
    trained, _ = split_frozen(params, config)
    step, halted = jnp.zeros((), jnp.int32), jnp.zeros((), bool)
    return TrainState(step, halted, params, optimizer.init(trained))


def split_frozen(params: nnx.State, config: RunConfig) -> tuple[nnx.State, nnx.State]:
    """The parameters that steps change, and those of `train.frozen_parameters`.

    Frozen ones have neither gradients nor optimizer state. `nnx.merge` and `nnx.merge_state` put
    both together again.

    Raises:
      ValueError: a glob matches no parameter, or all are frozen.
    """
    key, names = "train.frozen_parameters", [name for name, _ in named_leaves(params)]
    globs = config.train.frozen_parameters
    frozen = matching_names(names, globs, key=key)
    if frozen.issuperset(names):
        raise ValueError(f"{key}={globs} matches every parameter; leave some to be trained")

    def is_frozen(path: tuple[Any, ...], _: Any) -> bool:
        return "/".join(map(str, path)) in frozen

    trained, kept = nnx.split_state(params, nnx.Not(is_frozen), ...)
    return trained, kept


def make_gradients(
    graph: nnx.GraphDef, config: RunConfig
) -> Callable[[nnx.State, Batch], tuple[nnx.State, dict[str, Array]]]:
    """Returns a function from parameters and a step's batch to gradients and metrics.

    Gradients are those of the parameters that are not frozen. They are float32, though on a mesh
    parts of some are summed in the dtype of activations (docs/training.md, Precision).

    The metrics are loss and its terms; tokens, their number without padding; with experts,
    expert_load_max, the load of the busiest expert over the mean load, in the worst layer, and
    dropped_share, the share of assignments that were dropped; with `train.diagnostics`, the metrics
    of `diagnostics.layer_metrics`.
    """
    micro_batches = config.train.gradient_accumulation_steps

    def micro_loss(trained, frozen, micro_batch, counts, earlier):
        """The micro-batch's part of the step's loss; and its metrics, with its own loss."""
        value, metrics = loss(
            nnx.merge(graph, trained, frozen),
            micro_batch,
            mtp_weight=config.train.mtp_loss_weight,
            z_weight=config.train.router_z_loss_weight,
            balance_scope=config.train.balance_scope,
            chunk=config.train.loss_chunk,
            counts=counts,
            earlier_assignments=earlier,
            observe=config.train.diagnostics,
        )
        return value / micro_batches, {**metrics, "loss": value}

    def micro_gradients(params, micro_batch, counts, earlier):
        """Gradients, the assignments so far (None without experts), and metrics."""
        trained, frozen = split_frozen(params, config)
        by_trained = jax.grad(micro_loss, has_aux=True)
        grads, metrics = by_trained(trained, frozen, micro_batch, counts, earlier)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        return grads, metrics.pop("assignments", None), metrics

    def accumulated(params, batch, counts):
        """Gradients, assignments and metrics of a step, over its micro-batches."""
        # Micro-batch i has rows i, i + n, i + 2n, ...: then each device has rows of every
        # micro-batch already, and none is sent to another device.
        split = jax.tree.map(
            lambda x: x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1), batch
        )

        def accumulate(carry, micro_batch):
            total, earlier = carry
            grads, assignments, metrics = micro_gradients(params, micro_batch, counts, earlier)
            return (jax.tree.map(jnp.add, total, grads), assignments), metrics

        trained, _ = split_frozen(params, config)
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trained)
        routed = sum(sparse for _, sparse in config.model.all_layers)
        no_loads = jnp.zeros((routed, config.model.num_experts)) if routed else None
        (grads, assignments), metrics = jax.lax.scan(accumulate, (zeros, no_loads), split)
        observed = metrics.pop("observed", None)
        combined = {} if observed is None else {"observed": combine_parts(observed)}
        for name, x in metrics.items():
            combined[name] = x.sum() if name == "dropped_assignments" else x.mean()
        return grads, assignments, combined

    def gradients(params, batch):
        counts = count_labels(batch, config.model.mtp_steps)
        counts = jax.tree.map(lambda n: n / micro_batches, counts)
        if micro_batches == 1:
            grads, assignments, metrics = micro_gradients(params, batch, counts, None)
        else:
            grads, assignments, metrics = accumulated(params, batch, counts)
        observed = metrics.pop("observed", None)
        metrics["tokens"] = (batch["segment_ids"] != 0).sum()
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
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: RunConfig,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """Returns the step: from a state and a batch to the next state and metrics.

    The metrics are those of `make_gradients`, grad_norm (before clipping), learning_rate, halted
    and, with `train.diagnostics`, those of `diagnostics.update_ratios`.

    Args:
      graph: the model's structure.
      optimizer, schedule: what `make_optimizer` returns.
      config: the run's config.
    """
    gradients = make_gradients(graph, config)

    def train_step(state, batch):
        with jax.default_matmul_precision(config.precision.matmul):
            grads, metrics = gradients(state.params, batch)
        grad_norm = norm(grads)
        before, frozen = split_frozen(state.params, config)
        updates, opt_state = optimizer.update(grads, state.opt_state, before)
        after = optax.apply_updates(before, updates)
        if config.train.diagnostics:
            zero_centered = config.model.zero_centered_norm
            metrics |= update_ratios(updates, before, zero_centered_norm=zero_centered)
        halted = state.halted | ~(jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm))
        if config.mesh.on_overflow == "error":
            halted |= metrics.get("dropped_assignments", 0) > 0
        # There is no such select for the moments: XLA:CPU would compute the new ones twice, for the
        # select and in the update, and first copy the old ones, because both read them.
        step, trained = jax.tree.map(
            lambda new, old: jnp.where(halted, old, new),
            (state.step + 1, after),
            (state.step, before),
        )
        metrics |= {
            "grad_norm": grad_norm,
            "learning_rate": schedule(state.step),
            "halted": halted,
        }
        params = nnx.merge_state(trained, frozen)
        return TrainState(step, halted, params, opt_state), metrics

    return train_step


def first_bad_parameter(
    graph: nnx.GraphDef, config: RunConfig, params: nnx.State, batch: Batch
) -> str:
    """Names the first parameter whose value, or else gradient on this batch, is not finite."""

    @jax.jit
    def finite(params, batch):
        grads, _ = make_gradients(graph, config)(params, batch)
        return _finite(params), _finite(grads)

    for what, flags in zip(("value", "gradient"), finite(params, batch), strict=True):
        if name := _first_false(flags):
            return f"the {what} of {name}"
    return "no single parameter (the loss alone)"


def first_non_finite(params: nnx.State) -> str | None:
    """Names the first parameter with an entry that is not finite; None if there is none."""
    return _first_false(_finite(params))


@jax.jit
def _finite(params):
    return jax.tree.map(lambda x: jnp.isfinite(x).all(), params)


def _first_false(flags: nnx.State) -> str | None:
    return next((name for name, flag in named_leaves(flags) if not flag), None)
