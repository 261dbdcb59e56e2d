"""The optimizer: an ordered table of rules says which parameters decay, and which use Muon.

    u = direction(clip(g));  p ← p − rate(step) · (u + weight_decay · p)

AdamW's direction is that of Adam. Muon's is the momentum with the singular values of each matrix
set near 1, scaled to the typical size of AdamW's, so that learning rates carry over. Parameters
other than matrices between hidden activations use AdamW. All of it is float32, even if parameters
are bfloat16: with 8 bits of precision, a running mean of squares stops moving.
"""

import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers as Matrix

from qwen3next_jax.config import OptimizerConfig
from qwen3next_jax.ops.cpu import once
from qwen3next_jax.parallel.names import map_leaves, named_leaves
from qwen3next_jax.training.norm import norm

# As published (Jordan, 2024; Liu et al., arXiv:2502.16982): Muon's momentum, and the root mean
# square that its updates are scaled to, which is about AdamW's.
MUON_MOMENTUM, MUON_RMS = 0.95, 0.2


def make_optimizer(
    config: OptimizerConfig,
    num_steps: int,
    params: Any,
    *,
    moment_dtype: Any = jnp.float32,
    zero_centered_norm: bool = True,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Builds the optimizer of a run.

    Args:
      config: name, schedule and coefficients of the optimizer.
      num_steps: number of steps of the whole run, where the schedule ends.
      params: the model's parameters, or their shapes; only names and numbers of axes are used.
      moment_dtype: dtype of first moments; second moments are float32.
      zero_centered_norm: whether norms multiply by 1 + w. If they multiply by w, their weights
        don't decay, since decay would pull the factor to 0.

    Returns:
      The optimizer, whose updates are float32 and for `optax.apply_updates`; and its schedule, from
      the number of updates made so far to the learning rate.

    Raises:
      ValueError: names each parameter that no rule covers or, with Muon, whose axes are not those
        of its rule's matrices.
    """
    unknown = [name for name, _ in named_leaves(params) if _find_rule(name) is None]
    if unknown:
        raise ValueError(
            "No rule of training/optimizer.py says how to update " + ", ".join(unknown)
        )
    if config.name == "muon":
        _check_matrices(params)

    def decays(name: str, _: Any) -> bool:
        return _rule(name).decays and (zero_centered_norm or not re.search(_NORM, name))

    # A NumPy scalar, because times a bfloat16 moment a Python one would be rounded to bfloat16.
    b1, momentum = np.float32(config.b1), np.float32(MUON_MOMENTUM)
    direction = optax.scale_by_adam(b1, config.b2, config.eps, mu_dtype=moment_dtype)
    if config.name == "muon":
        muon = optax.chain(
            optax.contrib.scale_by_muon(
                beta=momentum,
                mu_dtype=moment_dtype,
                weight_dimension_numbers=lambda tree: map_leaves(
                    lambda n, _: _rule(n).matrix, tree
                ),
            ),
            optax.stateless(_scale_to_adamw),
        )
        direction = optax.partition(
            {"adamw": direction, "muon": muon},
            lambda tree: map_leaves(lambda n, _: "muon" if _rule(n).matrix else "adamw", tree),
        )
    schedule = make_schedule(config, num_steps)
    optimizer = optax.chain(
        _clip(config.clip_norm) if config.clip_norm else optax.identity(),
        direction,
        optax.add_decayed_weights(config.weight_decay, lambda tree: map_leaves(decays, tree)),
        optax.scale_by_learning_rate(lambda step: once(schedule, step)),
    )
    return _in_float32(optimizer), schedule


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """The learning rate as a function of the number of updates made so far.

    It rises linearly and reaches the peak once `warmup_steps` updates are made. It ends at
    `num_steps`, one past the last update, and starts above 0, so that every update has an effect.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    end, rest = peak * config.final_fraction, max(1, num_steps - warmup)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction)
    elif config.schedule == "wsd":
        fall = min(rest, round(config.decay_fraction * num_steps))
        after = optax.linear_schedule(peak, end, fall, transition_begin=rest - fall)
    else:
        after = optax.constant_schedule(peak)
    if warmup == 0:
        return after
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, after], boundaries=[warmup])


class Rule(NamedTuple):
    """How to update the parameters whose names end in a match of `pattern`."""

    pattern: str
    decays: bool
    matrix: Matrix | None  # input and output axes of a matrix for Muon; None: AdamW


# Axes of a single matrix, counted from the end; the remaining ones (layer groups, experts, the pair
# of gate and up) are batch axes. Heads are not: a projection to all heads is one matrix.
_MATRIX = Matrix((-2,), (-1,))  # [D, F]
_TO_HEADS = Matrix((-3,), (-2, -1))  # [D, N, H]
_FROM_HEADS = Matrix((-3, -2), (-1,))  # [N, P, D]

_NORM = r"norm\w*/weight$"

# The first match counts.
_RULES = (
    # Forgetting rates, and a norm that multiplies by w: 0 is no neutral value to decay towards.
    Rule(r"linear_attn/(A_log|dt_bias|norm/weight)", False, None),
    # Without decay, zero-centred norm weights have been seen to grow without bound.
    Rule(r"\w*norm\w*/weight", True, None),
    # A token's row has a gradient only where the token occurs: one-hot inputs and outputs have no
    # geometry that orthogonal updates would respect.
    Rule(r"embed_tokens|lm_head", True, None),
    # One filter for each channel: vectors, though stored as matrices.
    Rule(r"linear_attn/[qkv]_conv", True, None),
    # Gates: each column yields an independent scalar that goes through a saturating function.
    Rule(r"linear_attn/[ab]_proj|mlp/shared_expert_gate", True, None),
    # A rarely chosen expert's column has a small, noisy gradient; equal singular values would
    # make it as large as the others'.
    Rule(r"mlp/router", True, None),
    Rule(r"linear_attn/[qkvz]_proj|self_attn/(q|k|v|gate)_proj", True, _TO_HEADS),
    Rule(r"linear_attn/out_proj|self_attn/o_proj", True, _FROM_HEADS),
    Rule(r"mlp/(shared_expert/)?(gate|up|gate_up|down)_proj", True, _MATRIX),
    # [2, D, D]: the input is two concatenated vectors.
    Rule(r"mtp/fc", True, _FROM_HEADS),
)


def _find_rule(name: str) -> Rule | None:
    matches = (rule for rule in _RULES if re.fullmatch(rf"(.*/)?({rule.pattern})", name))
    return next(matches, None)


def _rule(name: str) -> Rule:
    rule = _find_rule(name)
    assert rule is not None, name  # make_optimizer has checked all names
    return rule


def _check_matrices(params: Any) -> None:
    """Raises a ValueError for parameters of a custom module that match a rule but not its axes.

    Counted from the end, the rule's axes would include that of the layer groups, and Muon would
    treat all layers as one matrix.
    """
    unlike = []
    for name, x in named_leaves(params):
        matrix = _rule(name).matrix
        # [D, F] may have any number of batch axes, as experts do; projections to or from heads may
        # not.
        heads = matrix in (_TO_HEADS, _FROM_HEADS)
        if heads and x.ndim - name.startswith("groups/") != 3:
            unlike.append(f"{name} {list(x.shape)}")
    if unlike:
        raise ValueError(
            "The rules of training/optimizer.py take parameters of these names for matrices with "
            f"other axes; give these other names, and rules of their own: {', '.join(unlike)}"
        )


def _scale_to_adamw(updates: Any, params: Any) -> Any:
    """Scales semi-orthogonal [m, n], whose root mean square is max(m, n)**-0.5, to MUON_RMS."""
    del params

    def scale(name, u):
        matrix = _rule(name).matrix
        assert matrix is not None  # the others went to AdamW
        size_in, size_out = (math.prod(u.shape[axis] for axis in axes) for axes in matrix)
        return u * MUON_RMS * max(size_in, size_out) ** 0.5

    return map_leaves(scale, updates)


def _clip(max_norm: float) -> optax.GradientTransformation:
    """Scales all gradients by one factor, to a global norm of at most `max_norm`.

    `optax.clip_by_global_norm` divides and selects entry by entry, for which XLA:CPU makes a
    separate pass over the gradients; it fuses the multiplication by a factor into the update.
    """

    def update(updates, params):
        del params
        factor = once(lambda global_norm: jnp.minimum(1, max_norm / global_norm), norm(updates))
        return jax.tree.map(lambda g: factor * g, updates)

    return optax.stateless(update)


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    def init(params):
        return inner.init(optax.tree.cast(params, jnp.float32))

    def update(updates, state, params=None):
        return inner.update(
            optax.tree.cast(updates, jnp.float32), state, optax.tree.cast(params, jnp.float32)
        )

    return optax.GradientTransformation(init, update)
