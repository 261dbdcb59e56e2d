"""What a layer remembers between calls while text is generated.

Each row of a batch is one sequence whose tokens occupy slots 0, 1, 2, ... without gaps. A call adds
the tokens whose segment id is not 0; padding behind them is ignored, so that prompts of unequal
lengths share a batch.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qwen3next_jax.config import LINEAR, ModelConfig


class AttentionCache(NamedTuple):
    """Keys and values of the tokens so far, by slot."""

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]


class DeltaCache(NamedTuple):
    """The delta rule's state, float32, and the last inputs of the three convolutions."""

    q_tail: Float[Array, "B L K H"]
    k_tail: Float[Array, "B L K H"]
    v_tail: Float[Array, "B L N P"]
    state: Float[Array, "B N H P"]


def empty_cache(config: ModelConfig, mixer: str, *, batch: int, slots: int, dtype=jnp.float32):
    """The cache of one layer before the first token.

    Args:
      config: the model's.
      mixer: "linear_attention" or "full_attention".
      batch: sequences.
      slots: tokens a sequence can have; the delta rule's cache does not depend on it.
      dtype: of keys, values and convolution inputs; the activations' own.
    """
    if mixer == LINEAR:
        K, H = config.linear_num_key_heads, config.linear_key_head_dim
        N, P = config.linear_num_value_heads, config.linear_value_head_dim
        L = config.linear_conv_kernel_dim - 1
        key_tail, value_tail = (
            jnp.zeros((batch, L, K, H), dtype),
            jnp.zeros((batch, L, N, P), dtype),
        )
        return DeltaCache(key_tail, key_tail, value_tail, jnp.zeros((batch, N, H, P)))
    keys = jnp.zeros((batch, slots, config.num_key_value_heads, config.head_dim), dtype)
    return AttentionCache(keys, keys)


def next_tail(
    tail: Float[Array, "B L *C"], x: Float[Array, "B T *C"], lengths: Int[Array, "B"]
) -> Float[Array, "B L *C"]:
    """The last L inputs after `lengths` of the tokens in x were added to those in tail."""
    joined = jnp.concatenate([tail, x.astype(tail.dtype)], axis=1)
    index = lengths[:, None] + jnp.arange(tail.shape[1])
    return jnp.take_along_axis(joined, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)
