"""Softmax attention with an output gate, every fourth layer's mixer.

    q, gate, k, v = projections of x;  q, k = rope(norm(q)), rope(norm(k))
    y = (attention(q, k, v) · sigmoid(gate)) W_o

The gate (Qiu et al., arXiv:2505.06708) lets a head output zero. Softmax weights sum to 1, so a head
without a gate cannot: it puts its weight on the first token instead, and activations grow large.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from qwen3next_jax.config import ModelConfig
from qwen3next_jax.model.cache import AttentionCache, add_to_slots
from qwen3next_jax.model.layers import RMSNorm, normal, project, weight
from qwen3next_jax.model.rope import apply_rope
from qwen3next_jax.model.statistics import Observed, sink_share, token_mean
from qwen3next_jax.ops.attention import cached_attention
from qwen3next_jax.ops.segments import default_positions
from qwen3next_jax.ops.shapes import check_hidden
from qwen3next_jax.parallel.context import attention
from qwen3next_jax.parallel.mesh import all_gathered


class GatedAttention(nnx.Module):
    """Grouped-query attention with q/k norms, partial rotary embedding and an output gate."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32):
        """Builds the layer from the attention fields of `config`."""
        D, N, K, H = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.config = config
        init = normal(config.initializer_range)
        self.q_proj = weight(rngs, init, param_dtype, embed=D, heads=N, head_dim=H)
        self.gate_proj = (
            weight(rngs, init, param_dtype, embed=D, heads=N, head_dim=H)
            if config.attention_output_gate
            else None
        )
        self.k_proj = weight(rngs, init, param_dtype, embed=D, kv_heads=K, head_dim=H)
        self.v_proj = weight(rngs, init, param_dtype, embed=D, kv_heads=K, head_dim=H)
        self.o_proj = weight(rngs, init, param_dtype, heads=N, head_dim=H, embed=D)
        self.q_norm = RMSNorm(config, H, param_dtype=param_dtype)
        self.k_norm = RMSNorm(config, H, param_dtype=param_dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        cache: AttentionCache | None = None,
        implementation: str | None = None,
        observed: Observed | None = None,
    ) -> Any:
        """Mixes tokens within their documents.

        Args:
          x: hidden states.
          segment_ids: document of each token, 0 for padding; None: each row is one document.
          positions: positions for the rotary embedding; None, without a cache only: 0, 1, 2, ... in
            each document. With a cache they are also the tokens' slots: consecutive ones, all
            within the cache.
          cache: keys and values of the earlier tokens, if any.
          implementation: implementation of `ops.attention`; not used with a cache.
          observed: dict to which the statistics `attention_sink` and `output_gate` are added.

        Returns:
          y [B, T, D] in x's dtype, or with a cache (y, the next cache).

        Raises:
          ValueError: x is not a float array [B, T, D], segment_ids or positions are not [B, T], or
            there is a cache and no positions.
        """
        check_hidden("x", x, self.config.hidden_size, segment_ids=segment_ids, positions=positions)
        x = jnp.asarray(x)
        B, T, _ = x.shape
        if positions is None:
            if cache is not None:
                raise ValueError("With a cache give positions [B, T]: which slots x's tokens take")
            positions = default_positions((B, T), segment_ids)

        def projected(w):
            return project(x, all_gathered(w, x.dtype))

        q = apply_rope(self.q_norm(projected(self.q_proj)), positions, self.config)
        k = apply_rope(self.k_norm(projected(self.k_proj)), positions, self.config)
        v = projected(self.v_proj)
        if observed is not None:
            observed["attention_sink"] = sink_share(q, k, segment_ids)
        if cache is None:
            out = attention(q, k, v, segment_ids=segment_ids, implementation=implementation)
        else:
            lengths = positions[:, 0]
            out = cached_attention(q, k, v, cached_k=cache.k, cached_v=cache.v, lengths=lengths)
            # Padding is written too, into slots after the sequence, which are not read before the
            # next tokens overwrite them.
            cache = add_to_slots(cache, k, v, _after(lengths, out))
        out = out.astype(x.dtype)
        if self.gate_proj is not None:
            gate = jax.nn.sigmoid(projected(self.gate_proj).astype(jnp.float32))
            out = (out.astype(jnp.float32) * gate).astype(x.dtype)
            if observed is not None:
                observed["output_gate"] = token_mean(gate.mean((2, 3)), segment_ids)
        y = project(out, all_gathered(self.o_proj, x.dtype), over=2)
        return y if cache is None else (y, cache)


def _after(lengths, out):
    """The lengths, unchanged, but with a data dependence on `out`.

    Unless the write to the cache depends on every read of it, XLA:CPU copies the whole cache at
    each token. An optimization barrier does not help: XLA:CPU drops it before it decides on copies.
    It must keep this select, because `out` might be NaN. (If it is, the lengths are wrong, but then
    the sequence is lost anyway.)
    """
    return jnp.where(jnp.isnan(out[:, 0, 0, 0]), 0, lengths)
