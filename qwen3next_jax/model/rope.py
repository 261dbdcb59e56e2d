"""Rotary position embedding on the first entries of each head, and YaRN for longer contexts.

Of the r rotated entries, i and i + r/2 form a pair that is rotated by position · θ^(−2i/r). YaRN
(Peng et al., arXiv:2309.00071) slows down the pairs too slow to complete a turn within the original
context, in training, keeps the fast ones, and interpolates in between.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qwen3next_jax.config import ModelConfig
from qwen3next_jax.ops.platform import platform


def apply_rope(
    x: Float[Array, "B T N H"], positions: Int[Array, "B T"], config: ModelConfig
) -> Float[Array, "B T N H"]:
    """Rotates the first `config.rotary_dim` entries of each head; angles are float32.

    Source: Su et al., RoFormer, arXiv:2104.09864; with `config.rope_scaling`, YaRN.
    """
    frequencies, magnitude = _frequencies(config)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = magnitude * jnp.cos(angles), magnitude * jnp.sin(angles)
    whole, half = x.astype(jnp.float32), config.rotary_dim // 2
    a, b, rest = jnp.split(whole, [half, 2 * half], axis=-1)
    if platform() != "tpu":
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1).astype(x.dtype)
    # To split off and rejoin the entries that are not rotated, the TPU compiler would copy all
    # heads. So they are multiplied by 1 and 0 is added, which on a CPU takes 1.5 times as long.
    padding = [(0, 0)] * (x.ndim - 1) + [(0, rest.shape[-1])]
    cos = jnp.pad(jnp.concatenate([cos, cos], -1), padding, constant_values=1)
    turned = jnp.pad(jnp.concatenate([-b * sin, a * sin], -1), padding)
    return (whole * cos + turned).astype(x.dtype)


def describe_positions(config: ModelConfig) -> str:
    """One line for the log: the context length, and how YaRN extends it."""
    if config.rope_scaling is None:
        return f"Positions to {config.context_length}, without YaRN"
    scaling = config.rope_scaling
    return (
        f"Positions to {config.context_length}: YaRN with factor {scaling['factor']:g} over the "
        f"original {config.original_context}, queries and keys times {_frequencies(config)[1]:.4f}"
    )


def _frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """Radians per position of each pair, and the factor by which queries and keys are scaled."""
    r, theta = config.rotary_dim, config.rope_theta
    # Rounded to float32 where PyTorch rounds, since the released models were trained with those
    # angles: at position 10⁶ the last bit of a frequency is worth up to 0.03 radians.
    exponents = np.arange(0, r, 2, dtype=np.float32) / np.float32(r)
    periods = np.power(float(theta), exponents, dtype=np.float64).astype(np.float32)
    frequencies = 1 / periods
    if config.rope_scaling is None:
        return frequencies, 1.0
    scaling = config.rope_scaling
    factor = scaling["factor"]

    def pair_turning(turns: float) -> float:
        """Index of the pair that makes so many turns within the original context."""
        return r * math.log(config.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    fast = max(math.floor(pair_turning(float(scaling.get("beta_fast") or 32))), 0)
    slow = min(math.ceil(pair_turning(float(scaling.get("beta_slow") or 1))), r - 1)
    index = np.arange(r // 2, dtype=np.float32)
    # As transformers: only a ramp without length gets one, and a reversed one is taken as it is.
    kept = 1 - np.clip((index - fast) / ((slow - fast) or 1e-3), 0, 1)
    frequencies = 1 / (factor * periods) * (1 - kept) + frequencies * kept
    magnitude = scaling.get("attention_factor")
    if magnitude is None:
        magnitude = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    return frequencies, magnitude
