"""Gated DeltaNet: the mixer of three in four layers, whose state does not grow with the text.

    q, k, v = silu(conv(projections of x));  q, k = q / |q| · H^−½, k / |k|
    β = sigmoid(b);  g = −exp(A_log) · softplus(a + dt_bias)
    y = (norm(delta_rule(q, k, v, g, β)) · silu(z)) W_o

β, g, both norms and silu(z) are float32 whatever x is: to round a gate to bfloat16 is to round how
long the layer remembers. `A_log` and `dt_bias` are float32 parameters for the same reason, and
A_log is drawn in float32, where log U(0.01, 16) cannot become log 0.

Source: Yang et al., Gated Delta Networks, arXiv:2412.06464.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from qwen3next_jax import ops
from qwen3next_jax.config import ModelConfig
from qwen3next_jax.model.cache import DeltaCache, DeltaDraft, next_tail
from qwen3next_jax.model.layers import constant, normal, project, rms_normalize, weight
from qwen3next_jax.model.statistics import Observed, token_mean
from qwen3next_jax.ops.shapes import check_hidden
from qwen3next_jax.parallel import context
from qwen3next_jax.parallel.mesh import all_gathered

_RECURRENT_TOKENS = 8  # up to so many tokens, the recurrence is less work than a chunk


class GatedDeltaNet(nnx.Module):
    """The gated delta rule with short convolutions before it and a gated norm after it.

    Key head i serves the N / K value heads from i · N / K on. Each projection has a parameter of
    its own, so that all of a head's weights, gates and filters can be placed on one device.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32):
        """Builds the layer from the `linear_*` fields of `config`.

        Raises:
          ValueError: the config has no `linear_*` sizes, as that of a model without such layers.
        """
        if not config.linear_num_value_heads:
            raise ValueError("This config has no linear_* sizes; give those of a GatedDeltaNet")
        D, W = config.hidden_size, config.linear_conv_kernel_dim
        K, H = config.linear_num_key_heads, config.linear_key_head_dim
        N, P = config.linear_num_value_heads, config.linear_value_head_dim
        self.eps = config.rms_norm_eps
        init = normal(config.initializer_range)
        keys, values = dict(key_heads=K, head_dim=H), dict(value_heads=N, head_dim=P)
        self.q_proj = weight(rngs, init, param_dtype, embed=D, **keys)
        self.k_proj = weight(rngs, init, param_dtype, embed=D, **keys)
        self.v_proj = weight(rngs, init, param_dtype, embed=D, **values)
        self.z_proj = weight(rngs, init, param_dtype, embed=D, **values)
        self.b_proj = weight(rngs, init, param_dtype, embed=D, value_heads=N)
        self.a_proj = weight(rngs, init, param_dtype, embed=D, value_heads=N)
        self.q_conv = weight(rngs, init, param_dtype, conv=W, **keys)
        self.k_conv = weight(rngs, init, param_dtype, conv=W, **keys)
        self.v_conv = weight(rngs, init, param_dtype, conv=W, **values)
        self.A_log = weight(rngs, _log_uniform, jnp.float32, value_heads=N)
        self.dt_bias = weight(None, constant(1.0), jnp.float32, value_heads=N)
        self.norm = nnx.Dict(weight=weight(None, constant(1.0), param_dtype, norm=P))
        self.out_proj = weight(rngs, init, param_dtype, value_heads=N, head_dim=P, embed=D)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        cache: DeltaCache | None = None,
        draft: bool = False,
        implementation: str | None = None,
        observed: Observed | None = None,
    ) -> Any:
        """Mixes tokens within their documents.

        Args:
          x: hidden states.
          segment_ids: document of each token, 0 for padding; None: each row is one document. With
            a cache: 1 for tokens of the sequence, 0 for padding after them.
          positions: [B, T] or None; not used, since the recurrence has no need of positions.
          cache: the layer's state after the earlier tokens, if any.
          draft: with a cache, whether some of the tokens may be rejected; then the next cache is a
            `DeltaDraft`.
          implementation: implementation of `ops.gated_delta_rule`; up to `_RECURRENT_TOKENS` tokens
            with a cache always take the recurrence.
          observed: dict to which the statistics `decay` and `beta` of each head are added.

        Returns:
          y [B, T, D] in x's dtype, or with a cache (y, the next cache).

        Raises:
          ValueError: x is not a float array [B, T, D], or segment_ids or positions are not [B, T].
        """
        check_hidden("x", x, self.q_proj.shape[0], segment_ids=segment_ids, positions=positions)
        x = jnp.asarray(x)
        B, T, _ = x.shape

        def projected(w, into=None):
            return project(x, all_gathered(w, x.dtype), into=into)

        inputs = [projected(w) for w in (self.q_proj, self.k_proj, self.v_proj)]
        kernels = [w[...] for w in (self.q_conv, self.k_conv, self.v_conv)]
        tails = [None] * 3 if cache is None else cache[:3]
        # With a cache, tokens are never split over devices: `Generation` runs without a mesh.
        where = context if cache is None else ops
        q, k, v = (
            where.causal_conv(x, w, activation="silu", segment_ids=segment_ids, tail=tail)
            for x, w, tail in zip(inputs, kernels, tails, strict=True)
        )
        beta = jax.nn.sigmoid(projected(self.b_proj, into=jnp.float32))
        step = jax.nn.softplus(projected(self.a_proj, into=jnp.float32) + self.dt_bias[...])
        q, k = _unit_length(q) * q.shape[-1] ** -0.5, _unit_length(k)
        log_decay = -jnp.exp(self.A_log[...].astype(jnp.float32)) * step
        if observed is not None:
            observed["decay"] = token_mean(-log_decay, segment_ids)
            observed["beta"] = token_mean(beta, segment_ids)
        if cache is not None and T <= _RECURRENT_TOKENS:
            implementation = "reference"
        out, state = where.gated_delta_rule(
            q,
            k,
            v,
            log_decay=log_decay,
            beta=beta,
            segment_ids=segment_ids,
            initial_state=None if cache is None else cache.state,
            implementation=implementation,
        )
        out = rms_normalize(out, self.eps) * self.norm.weight[...].astype(jnp.float32)
        out = out * jax.nn.silu(projected(self.z_proj).astype(jnp.float32))
        y = project(out.astype(x.dtype), all_gathered(self.out_proj, x.dtype), over=2)
        if cache is None:
            return y
        if draft:
            return y, DeltaDraft(cache, tuple(inputs), k, v, log_decay, beta)
        added = jnp.full(B, T) if segment_ids is None else (segment_ids != 0).sum(1)
        q_tail, k_tail, v_tail = (
            next_tail(tail, x, added) for tail, x in zip(cache[:3], inputs, strict=True)
        )
        return y, DeltaCache(q_tail, k_tail, v_tail, state)


def _log_uniform(key, shape):
    return jnp.log(jax.random.uniform(key, shape, minval=0.01, maxval=16.0))


def _unit_length(x):
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-6)  # as the released code has it
