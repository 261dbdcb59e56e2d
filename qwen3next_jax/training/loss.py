"""What training minimises, term by term.

    loss = ce + w_mtp · mtp_ce + c · balance_loss + w_z · router_z_loss

- `ce`: cross-entropy of the next token, in nats a token; evaluation reports only this term.
- `mtp_ce`: cross-entropy of the tokens after the next, the mean over MTP steps of each step's mean
  over its own labels. Labels are shifted inside a document only: its last tokens have none.
- `balance_loss`: per layer E · Σ_e f_e P_e with f the share of assignments and P the mean
  probability of each expert; the mean over layers, including the MTP module's. It is 1 when loads
  are even. The tokens over which f is computed decide whether experts may specialise (Qiu et al.,
  arXiv:2501.11873): with "global" those of the whole step, that is all devices and the
  micro-batches seen so far; with "micro_batch" one micro-batch; with "sequence" each row.
- `router_z_loss`: the mean of logsumexp(router logits)² (Zoph et al., arXiv:2202.08906).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qwen3next_jax.model.decoder import Qwen3Next
from qwen3next_jax.model.moe import RouterStats
from qwen3next_jax.model.statistics import Mean, Observed, combine_parts, concatenate_layers
from qwen3next_jax.ops.segments import default_positions
from qwen3next_jax.ops.shapes import check_rows, check_shape
from qwen3next_jax.parallel.vocabulary import cross_entropy

Batch = Mapping[str, Array]


BATCH_DTYPES = {
    "tokens": jnp.int32,
    "targets": jnp.int32,
    "loss_weights": jnp.float32,
    "segment_ids": jnp.int32,
    "positions": jnp.int32,
}


class TokenCounts(NamedTuple):
    """The number of labels in each mean: of the next token, and of each MTP step."""

    ce: Float[Array, ""]
    mtp: Float[Array, "steps"]


def loss(
    model: Qwen3Next,
    batch: Batch,
    *,
    mtp_weight: float = 0.1,
    z_weight: float = 0.0,
    balance_scope: str = "global",
    chunk: int = 512,
    counts: TokenCounts | None = None,
    earlier_assignments: Float[Array, "L E"] | None = None,
    observe: bool = False,
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """The loss of one batch or micro-batch, and its terms.

        (value, metrics), grads = nnx.value_and_grad(lambda m: loss(m, batch), has_aux=True)(model)

    The lambda is needed because `nnx.value_and_grad` refuses keyword-only parameters.

    Args:
      model: the model; its config has the coefficient of the balance loss, `router_aux_loss_coef`.
      batch: arrays tokens, targets, loss_weights, segment_ids, positions, each [B, T].
      mtp_weight: weight of mtp_ce.
      z_weight: weight of router_z_loss.
      balance_scope: "global", "micro_batch" or "sequence".
      chunk: positions of a row whose logits are materialised at a time.
      counts: number of labels in each mean, if the batch is one of several micro-batches: of a
        micro-batch on average, so that the mean over all is the step's. None: those of the batch.
      earlier_assignments: assignments to each expert of each layer in this step's earlier
        micro-batches.
      observe: whether to add `observed` to the metrics, the layers' statistics with the MTP
        module's last.

    Returns:
      The loss, and the metrics ce, mtp_ce, balance_loss, router_z_loss, dropped_assignments (as far
      as the model has them) and assignments [L, E], the earlier ones included. All float32.

    Raises:
      ValueError: `balance_scope` is unknown, or the batch lacks an array or has one of another
        shape.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"The batch is a {type(batch).__name__}; `complete_batch` makes a whole one from tokens"
        )
    if missing := [name for name in BATCH_DTYPES if name not in batch]:
        raise ValueError(
            f"The batch lacks {', '.join(missing)}; `complete_batch` makes all from tokens"
        )
    check_shape("tokens", batch["tokens"], "B", "T")
    integers = [name for name, dtype in BATCH_DTYPES.items() if dtype == jnp.int32]
    check_rows(batch["tokens"].shape, **{name: batch[name] for name in integers})
    check_shape("loss_weights", batch["loss_weights"], *batch["tokens"].shape)
    if balance_scope not in ("global", "micro_batch", "sequence"):
        raise ValueError(
            f"{balance_scope=} is unknown; expected 'global', 'micro_batch' or 'sequence'"
        )
    counts = counts or count_labels(batch, model.config.mtp_steps)
    observed: Observed | None = {} if observe else None
    hidden, stats = model.hidden_states(
        batch["tokens"], batch["segment_ids"], batch["positions"], observed
    )
    head = model.head()
    total, _ = cross_entropy(hidden, head, batch["targets"], batch["loss_weights"], chunk=chunk)
    metrics: dict[str, Any] = {"ce": total / counts.ce}
    value = metrics["ce"]

    if model.mtp is not None:
        mtp_ce, mtp_stats, mtp_observed = _mtp_terms(
            model, batch, hidden, head, counts.mtp, chunk=chunk, observe=observe
        )
        metrics["mtp_ce"] = mtp_ce
        value += mtp_weight * mtp_ce
        if observed is not None:
            observed.update(concatenate_layers([observed, mtp_observed]))
        if stats is None:
            stats = mtp_stats
        elif mtp_stats is not None:
            stats = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), stats, mtp_stats)

    if stats is not None:
        balance, assignments = _balance_loss(stats, balance_scope, earlier_assignments)
        z_loss = (stats.squared_lse.sum(1) / _or_one(stats.tokens.sum(1))).mean()
        value += model.config.router_aux_loss_coef * balance + z_weight * z_loss
        metrics |= {"balance_loss": balance, "router_z_loss": z_loss, "assignments": assignments}
        metrics["dropped_assignments"] = stats.dropped.sum()
        if observed is not None:
            observed["router_entropy"] = Mean(stats.entropies.sum(1), stats.tokens.sum(1))
    if observed is not None:
        metrics["observed"] = observed
    return value, metrics


def _mtp_terms(
    model: Qwen3Next,
    batch: Batch,
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    counts: Float[Array, "steps"],
    *,
    chunk: int,
    observe: bool,
) -> tuple[Float[Array, ""], RouterStats | None, Observed]:
    """Unrolls the MTP module.

    Returns:
      mtp_ce; the router's statistics, None without experts; the observed statistics, {} unless
      `observe`. Statistics of all steps are combined into those of one layer, since the steps share
      one module.
    """
    assert model.mtp is not None
    mtp_ce, all_stats, all_observed = jnp.zeros((), jnp.float32), [], []
    for step in range(1, len(counts) + 1):
        ahead = _ahead(batch, step)
        observed: Observed | None = {} if observe else None
        hidden, stats, _ = model.mtp(
            hidden,
            model.embed(ahead["tokens"]),
            segment_ids=ahead["segment_ids"],
            positions=batch["positions"],
            observed=observed,
        )
        total, _ = cross_entropy(hidden, head, ahead["targets"], ahead["loss_weights"], chunk=chunk)
        mtp_ce += total / counts[step - 1] / len(counts)
        all_stats.append(stats)
        all_observed.append(observed or {})
    together = combine_parts(jax.tree.map(lambda *x: jnp.stack(x), *all_observed))
    mtp_observed = jax.tree.map(lambda x: x[None], together)
    if all_stats[0] is None:
        return mtp_ce, None, mtp_observed
    return mtp_ce, jax.tree.map(lambda *s: sum(s)[None], *all_stats), mtp_observed


def next_token_losses(
    model: Qwen3Next, batch: Batch, *, chunk: int = 512
) -> tuple[Float[Array, "B T"], Float[Array, ""]]:
    """The cross-entropy of each next token, for evaluation.

    Args:
      model: the model.
      batch: as in `loss`.
      chunk: positions of a row whose logits are materialised at a time.

    Returns:
      Weighted cross-entropies in nats, without gradient (docs/training.md, "A loss of your own",
      shows how to train on a function of them); and the number of dropped assignments of tokens to
      experts (`mesh.moe_buffer_factor`).
    """
    hidden, stats = model.hidden_states(batch["tokens"], batch["segment_ids"], batch["positions"])
    _, losses = cross_entropy(
        hidden, model.head(), batch["targets"], batch["loss_weights"], chunk=chunk
    )
    dropped = jnp.zeros(()) if stats is None else stats.dropped.sum()
    return losses * batch["loss_weights"], dropped


def count_labels(batch: Batch, mtp_steps: int) -> TokenCounts:
    """Sums the weights of the next-token labels and of each MTP step's labels; 1 in place of 0."""

    def total(batch):
        return batch["loss_weights"].sum(dtype=jnp.float32)

    ahead = [total(_ahead(batch, step)) for step in range(1, mtp_steps + 1)]
    mtp = jnp.stack(ahead) if ahead else jnp.zeros(0)
    return TokenCounts(_or_one(total(batch)), _or_one(mtp))


def _ahead(batch: Batch, step: int) -> dict[str, Array]:
    """The inputs and labels of an MTP step: at t, the batch at t + step in t's document."""

    def shift(x):
        return jnp.pad(x, ((0, 0), (0, step)))[:, step:]

    segments = batch["segment_ids"]
    inside = (shift(segments) == segments) & (segments != 0)
    return {
        "tokens": shift(batch["tokens"]),
        "targets": shift(batch["targets"]),
        "loss_weights": jnp.where(inside, shift(batch["loss_weights"]), 0),
        # The last positions of a document have no input: they become padding. No later position
        # of the document exists that could have attended to them.
        "segment_ids": jnp.where(inside, segments, 0),
    }


def _balance_loss(
    stats: RouterStats, scope: str, earlier: Float[Array, "L E"] | None
) -> tuple[Float[Array, ""], Float[Array, "L E"]]:
    E = stats.counts.shape[-1]
    assignments = stats.counts.sum(1)
    if earlier is not None:
        assignments += earlier
    if scope == "sequence":
        share = stats.counts / _or_one(stats.counts.sum(-1, keepdims=True))
        mean = stats.probabilities / _or_one(stats.tokens)[..., None]
        per_row = E * (share * mean).sum(-1)
        # Rows of padding alone are left out of the mean.
        seen = stats.tokens > 0
        balance = ((per_row * seen).sum(1) / _or_one(seen.sum(1))).mean()
    else:
        counted = assignments if scope == "global" else stats.counts.sum(1)
        share = counted / _or_one(counted.sum(-1, keepdims=True))
        mean = stats.probabilities.sum(1) / _or_one(stats.tokens.sum(1))[:, None]
        balance = E * (share * mean).sum(-1).mean()
    return balance, jax.lax.stop_gradient(assignments)


def _or_one(x):
    """A divisor: x, or 1 where x is 0."""
    return jnp.where(x > 0, x, 1)


def complete_batch(
    tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None
) -> Batch:
    """A batch from rows of tokens, in which each token predicts the next one of its document.

    Args:
      tokens: rows of tokens.
      segment_ids: document of each token, 0 for padding; None: each row is one document.

    Raises:
      ValueError: tokens are not an integer array [B, T] or, outside of transformations, have
        negative entries; or segment_ids are not of that shape.
    """
    check_shape("tokens", tokens, "B", "T")
    check_rows(tokens.shape, tokens=tokens, segment_ids=segment_ids)
    if not isinstance(tokens, jax.core.Tracer) and tokens.size and (least := tokens.min()) < 0:
        raise ValueError(
            f"tokens holds {least}; expected ids of at least 0. Padding has segment id 0, and "
            "labels to be ignored have loss_weights 0"
        )
    tokens = jnp.asarray(tokens, jnp.int32)  # bytes, say, could not hold larger ids
    if segment_ids is None:
        segment_ids = jnp.ones_like(tokens)
    segment_ids = jnp.asarray(segment_ids, jnp.int32)
    after = jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1)))
    return {
        "tokens": tokens,
        "targets": jnp.pad(tokens[:, 1:], ((0, 0), (0, 1))),
        "loss_weights": ((after == segment_ids) & (segment_ids != 0)).astype(jnp.float32),
        "segment_ids": segment_ids,
        "positions": default_positions(tokens.shape, segment_ids),
    }
