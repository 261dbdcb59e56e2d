"""The state of a layer between calls during generation.

Each row of a batch is one sequence, whose tokens occupy slots 0, 1, 2, ... without gaps. A call
adds the tokens whose segment id is not 0; padding after them is ignored, so that prompts of
unequal lengths can share a batch.

Speculative decoding must be able to reject tokens. In an attention layer that is free: slots beyond
the sequence are never read, and are overwritten later. The state of a delta layer cannot be rolled
back, so with `draft=True` the layer returns a `DeltaDraft`: the cache from before the call and the
inputs of the call's tokens, from which the accepted ones are applied once they are known.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qwen3next_jax.config import FULL, LINEAR, ModelConfig, require_known
from qwen3next_jax.ops.cpu import writable
from qwen3next_jax.ops.delta_rule import gated_delta_rule


class AttentionCache(NamedTuple):
    """Keys and values by slot, each in the layout that its product in attention reads."""

    k: Float[Array, "B K H S"]
    v: Float[Array, "B K S H"]


class DeltaCache(NamedTuple):
    """The delta rule's state, float32, and the last inputs of the three convolutions."""

    q_tail: Float[Array, "B L K H"]
    k_tail: Float[Array, "B L K H"]
    v_tail: Float[Array, "B L N P"]
    state: Float[Array, "B N H P"]


class DeltaDraft(NamedTuple):
    """A delta layer's cache, and T further tokens of which a prefix will be accepted.

    `k`, `v`, `log_decay` and `beta` are inputs of the delta rule, `conv_inputs` of the convolutions
    of q, k and v.
    """

    before: DeltaCache
    conv_inputs: tuple[Float[Array, "B T K H"], Float[Array, "B T K H"], Float[Array, "B T N P"]]
    k: Float[Array, "B T K H"]
    v: Float[Array, "B T N P"]
    log_decay: Float[Array, "B T N"]
    beta: Float[Array, "B T N"]

    def accept(self, lengths: Int[Array, "B"]) -> DeltaCache:
        """The cache after the first `lengths` of each row's tokens, at most T."""
        accepted = (jnp.arange(self.k.shape[1]) < lengths[:, None]).astype(jnp.int32)
        _, state = gated_delta_rule(
            self.k,  # in place of q: only the final state is used, so any q will do
            self.k,
            self.v,
            log_decay=self.log_decay,
            beta=self.beta,
            segment_ids=accepted,
            initial_state=self.before.state,
            implementation="reference",
        )
        q_tail, k_tail, v_tail = (
            next_tail(tail, x, lengths)
            for tail, x in zip(self.before[:3], self.conv_inputs, strict=True)
        )
        return DeltaCache(q_tail, k_tail, v_tail, state)


def accept(cache: Any, lengths: Int[Array, "B"]) -> Any:
    """Replaces each `DeltaDraft` in a tree of caches by its cache after `lengths` tokens a row."""

    def is_draft(x):
        return isinstance(x, DeltaDraft)

    return jax.tree.map(lambda x: x.accept(lengths) if is_draft(x) else x, cache, is_leaf=is_draft)


def empty_cache(
    config: ModelConfig, mixer: str, *, batch: int, slots: int, dtype=jnp.float32
) -> AttentionCache | DeltaCache:
    """The cache of one layer before the first token.

    Args:
      config: the model's config.
      mixer: "linear_attention" or "full_attention".
      batch: number of sequences.
      slots: most tokens of a sequence; the cache of a delta layer does not depend on it.
      dtype: dtype of keys, values and convolution inputs, which is that of the activations; on a
        CPU they are float32 in place of bfloat16.

    Raises:
      ValueError: for an unknown mixer.
    """
    require_known("mixer", [mixer], (LINEAR, FULL))
    dtype = writable(dtype)
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
    """Writes each row's T keys and values into the slots from `first` on.

    All T slots must exist: `dynamic_update_slice` moves a write that would end beyond the last slot
    back, over earlier tokens.
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
    """The last L inputs of each row after appending the first `lengths` tokens of x to `tail`."""
    joined = jnp.concatenate([tail, x.astype(tail.dtype)], axis=1)
    index = lengths[:, None] + jnp.arange(tail.shape[1])
    return jnp.take_along_axis(joined, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)
