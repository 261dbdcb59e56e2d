"""Metrics of the architecture, with a number for each layer or part of the model.

    load_max, load_entropy     are the experts evenly used?
    router_entropy             does the router's choice still depend on the token?
    decay_*, beta_*            how long do delta layers remember, how strongly do they write?
    output_gate, shared_gate   how open are the gates?
    attention_sink             do heads put their weight on the first token?
    activation_max             does the residual stream have outliers?
    update_ratio               does each part of the model learn at a sensible rate?

The modules collect sums and maxima (`model/statistics.py`), from which the metrics are computed
here.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qwen3next_jax.config import FULL, LINEAR, ModelConfig
from qwen3next_jax.model.statistics import Largest, Observed
from qwen3next_jax.parallel.mesh import constrain
from qwen3next_jax.parallel.names import named_leaves
from qwen3next_jax.training.norm import norm

# Parts of the model by their parameters' names; the first match counts.
_PARTS = {
    "mtp": r"mtp/.*",
    "embedding": r"embed_tokens",
    "head": r"lm_head",
    "delta": r".*/linear_attn/.*",
    "attention": r".*/self_attn/.*",
    "router": r".*/mlp/(router|shared_expert_gate)",
    "shared_expert": r".*/mlp/shared_expert/.*",
    "feed_forward": r".*/mlp/.*",  # experts, or the dense one
    "norms": r"(.*/)?\w*norm/weight",
}
# The metrics by the layers that have them. What delta layers observe of each head becomes its mean,
# least and largest.
_EVERY = ("activation_max",)
_DELTA = tuple(f"{name}_{of}" for name in ("decay", "beta") for of in ("mean", "min", "max"))
_ATTENTION = ("output_gate", "attention_sink")
_EXPERTS = ("shared_gate", "router_entropy", "load_max", "load_entropy")


def layer_metrics(
    observed: Observed, assignments: Float[Array, "L E"] | None
) -> dict[str, Float[Array, "_"]]:
    """Metrics `layers/NAME`, each an array with a number for each layer that NAME applies to.

    Args:
      observed: statistics of the whole step, each stacked over the layers that have it.
      assignments: assignments to each expert in the whole step, of the layers with experts.
    """
    metrics = {}
    for name, x in observed.items():
        value = x.value if isinstance(x, Largest) else _divided(x.total, x.tokens)
        if value.ndim == 1:
            metrics[name] = value
        else:  # a value for each head
            metrics[f"{name}_mean"] = value.mean(-1)
            metrics[f"{name}_min"], metrics[f"{name}_max"] = value.min(-1), value.max(-1)
    if assignments is not None:
        even = jnp.log(assignments.shape[-1])
        share = assignments / jnp.maximum(assignments.sum(-1, keepdims=True), 1)
        metrics["load_max"] = share.max(-1) * assignments.shape[-1]
        metrics["load_entropy"] = jax.scipy.special.entr(share).sum(-1) / even
        metrics["router_entropy"] /= even
    # Replicated, so that every process can read them.
    return {f"layers/{name}": constrain(value, "layers") for name, value in metrics.items()}


def for_all_layers(config: ModelConfig, name: str, values: list[float]) -> list[float | None]:
    """Spreads the numbers of `layers/NAME` over all layers, the MTP module last.

    Args:
      config: the model's config.
      name: name of the metric, with or without "layers/".
      values: a number for each layer that NAME applies to.

    Returns:
      A number for each layer, None if NAME does not apply to it.

    Raises:
      ValueError: NAME is unknown, or the number of values is another.
    """
    name = name.removeprefix("layers/")
    having = [i for i, layer in enumerate(config.all_layers) if _has(name, *layer)]
    if len(values) != len(having):
        raise ValueError(
            f"layers/{name} has {len(values)} numbers, and {len(having)} layers have it; name it "
            "in training/diagnostics.py among those of the right layers"
        )
    spread: list[float | None] = [None] * len(config.all_layers)
    for i, value in zip(having, values, strict=True):
        spread[i] = value
    return spread


def _has(name: str, mixer: str, sparse: bool) -> bool:
    if name in _EVERY:
        return True
    if name in _DELTA:
        return mixer == LINEAR
    if name in _ATTENTION:
        return mixer == FULL
    if name in _EXPERTS:
        return sparse
    raise ValueError(
        f"layers/{name} is unknown; name it in training/diagnostics.py among those of the layers "
        "that have it"
    )


def update_ratios(
    updates: Any, params: Any, *, zero_centered_norm: bool
) -> dict[str, Float[Array, ""]]:
    """Metrics `update_ratio/PART`: the norm of what a step adds over that of the parameters.

    What bfloat16 parameters round away of an update is not counted.

    Args:
      updates: the step's updates.
      params: the parameters before the step.
      zero_centered_norm: whether norms multiply by 1 + w; then 1 + w is taken as the parameter,
        since w starts at 0.
    """
    parts: dict[str, tuple[list[Array], list[Array]]] = {}
    for (name, u), (_, p) in zip(named_leaves(updates), named_leaves(params), strict=True):
        part = next((k for k, pattern in _PARTS.items() if re.fullmatch(pattern, name)), "other")
        u, p = _added(u, p), p.astype(jnp.float32)
        # The gated norms of delta layers multiply by w in any case.
        centred = zero_centered_norm and re.fullmatch(r"(?!.*/linear_attn/).*norm\w*/weight", name)
        of_updates, of_params = parts.setdefault(part, ([], []))
        of_updates.append(u)
        of_params.append(p + (1 if centred else 0))
    return {f"update_ratio/{part}": _divided(*map(norm, both)) for part, both in parts.items()}


def _added(update, param):
    """What is left of a float32 update once it is added to a parameter."""
    if param.dtype == jnp.float32:
        return update
    kind, before = jnp.finfo(param.dtype), param.astype(jnp.float32)
    # Compilers leave out a conversion to bfloat16 and back, but not this.
    after = jax.lax.reduce_precision(before + update, kind.nexp, kind.nmant)
    return after - before


def _divided(total, count):
    count = count.reshape(*count.shape, *[1] * (total.ndim - count.ndim))
    return total / jnp.where(count > 0, count, 1)
