"""The state of a layer between calls while text is generated.

Each row of a batch is one sequence, whose tokens occupy slots 0, 1, 2, ... without gaps. A call
adds the tokens whose segment id is not 0; padding behind them is ignored, so that prompts of
unequal lengths can share a batch.

Speculative decoding must be able to take tokens back. In an attention layer that is free: slots
beyond the sequence are never read, and are overwritten. The state of a delta layer cannot be rolled
back, so with `draft=True` the layer returns a `DeltaDraft`: the cache from before the call, and all
that is needed to apply the first few of the call's tokens to it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qwen3next_jax.config import LINEAR, ModelConfig
from qwen3next_jax.ops.delta_rule import gated_delta_rule


class AttentionCache(NamedTuple):
    """Keys and values of the tokens so far, by slot, as the two products of attention read them."""

    k: Float[Array, "B K H S"]
    v: Float[Array, "B K S H"]


class DeltaCache(NamedTuple):
    """The delta rule's state, float32, and the last inputs of the three convolutions."""

    q_tail: Float[Array, "B L K H"]
    k_tail: Float[Array, "B L K H"]
    v_tail: Float[Array, "B L N P"]
    state: Float[Array, "B N H P"]


class DeltaDraft(NamedTuple):
    """A delta layer's cache, and tokens behind it of which the first few will be kept."""

    before: DeltaCache
    conv_inputs: tuple[Float[Array, "B T K H"], Float[Array, "B T K H"], Float[Array, "B T N P"]]
    k: Float[Array, "B T K H"]  # these four as the delta rule takes them
    v: Float[Array, "B T N P"]
    log_decay: Float[Array, "B T N"]
    beta: Float[Array, "B T N"]

    def keep(self, lengths: Int[Array, "B"]) -> DeltaCache:
        """The cache after the first `lengths` of the drafted tokens of each row."""
        kept = (jnp.arange(self.k.shape[1]) < lengths[:, None]).astype(jnp.int32)
        _, state = gated_delta_rule(
            self.k, self.k, self.v, log_decay=self.log_decay, beta=self.beta, segment_ids=kept,
            initial_state=self.before.state, implementation="reference",
        )  # fmt: skip
        q_tail, k_tail, v_tail = (
            next_tail(tail, x, lengths)
            for tail, x in zip(self.before[:3], self.conv_inputs, strict=True)
        )
        return DeltaCache(q_tail, k_tail, v_tail, state)


def keep(cache: Any, lengths: Int[Array, "B"]) -> Any:
    """Replaces all drafts in a cache by the caches after the first `lengths` tokens of each row."""

    def is_draft(x):
        return isinstance(x, DeltaDraft)

    return jax.tree.map(lambda x: x.keep(lengths) if is_draft(x) else x, cache, is_leaf=is_draft)


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

        def tail(heads, size):
            return jnp.zeros((batch, L, heads, size), dtype)

        state = jnp.zeros((batch, N, H, P), jnp.float32)
        return DeltaCache(tail(K, H), tail(K, H), tail(N, P), state)
    heads, size = config.num_key_value_heads, config.head_dim
    return AttentionCache(
        jnp.zeros((batch, heads, size, slots), dtype), jnp.zeros((batch, heads, slots, size), dtype)
    )


def add_to_slots(
    cache: AttentionCache,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    first: Int[Array, "B"],
) -> AttentionCache:
    """Writes T tokens' keys and values into the slots from `first` on, of each row.

    All T slots must exist: what would lie beyond the last one is moved back over earlier tokens.
    """

    @jax.vmap
    def write(k_row, v_row, k, v, first):
        k, v = k.transpose(1, 2, 0).astype(k_row.dtype), v.swapaxes(0, 1).astype(v_row.dtype)
        return AttentionCache(
            jax.lax.dynamic_update_slice_in_dim(k_row, k, first, axis=2),
            jax.lax.dynamic_update_slice_in_dim(v_row, v, first, axis=1),
        )

    return write(*cache, k, v, first)


def next_tail(
    tail: Float[Array, "B L *C"], x: Float[Array, "B T *C"], lengths: Int[Array, "B"]
) -> Float[Array, "B L *C"]:
    """The last L inputs after `lengths` of the tokens in x were added to those in tail."""
    joined = jnp.concatenate([tail, x.astype(tail.dtype)], axis=1)
    index = lengths[:, None] + jnp.arange(tail.shape[1])
    return jnp.take_along_axis(joined, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)
