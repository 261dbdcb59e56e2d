"""The ultra-sparse mixture of experts: of E experts each token uses A, and one shared by all.

    p = softmax(x W_r);  y = Σ_{e in top A of p} (p_e / Σ p) expert_e(x) + sigmoid(x w_s) shared(x)

The router is float32 throughout. Its rows start with equal norms, so that no expert is favoured
before anything is learnt.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from qwen3next_jax.config import ModelConfig
from qwen3next_jax.model.layers import MLP, normal, weight
from qwen3next_jax.ops.grouped_matmul import default_implementation, grouped_matmul, row_alignment
from qwen3next_jax.parallel.expert import apply_experts, apply_used_experts


class RouterStats(NamedTuple):
    """What the router did, by row of the batch, padding not counted; the loss makes more of it."""

    counts: Float[Array, "*L B E"]  # assignments to each expert
    probabilities: Float[Array, "*L B E"]  # sums of the router's probabilities
    squared_log_norms: Float[Array, "*L B"]  # sums of logsumexp(logits)², for the z-loss
    tokens: Float[Array, "*L B"]


class SparseMoE(nnx.Module):
    """Top-k routed experts plus a gated shared expert."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32):
        """Builds the layer from the expert fields of `config`."""
        D, E, F = config.hidden_size, config.num_experts, config.moe_intermediate_size
        self.config = config
        init = normal(config.initializer_range)
        router = (
            _equal_rows(config.initializer_range) if config.router_init == "normalized" else init
        )
        self.router = weight(rngs, router, param_dtype, embed=D, router=E)
        self.gate_up_proj = weight(
            rngs, init, param_dtype, experts=E, embed=D, pair=2, expert_mlp=F
        )
        self.down_proj = weight(rngs, init, param_dtype, experts=E, expert_mlp=F, embed=D)
        if width := config.shared_expert_intermediate_size:
            self.shared_expert = MLP(config, width, rngs=rngs, param_dtype=param_dtype)
            self.shared_expert_gate = weight(rngs, init, param_dtype, embed=D)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Maps each token by itself; `with_stats` also tells what the router did."""
        return self.with_stats(x)[0]

    def with_stats(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        decoding: bool = False,
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """Like a call, with the router's statistics over all tokens but padding (segment id 0).

        `decoding` says that no gradient will be asked for, which allows the way for few tokens.
        """
        experts, weights, stats = self._route(x, segment_ids)
        tokens, experts, weights = (a.reshape(-1, a.shape[-1]) for a in (x, experts, weights))
        given = dict(num_experts=self.config.num_experts)
        implementation = default_implementation()
        if decoding and implementation == "blocked" and len(tokens) <= row_alignment("blocked"):
            # Even an expert with all of the tokens would not fill its block.
            y = apply_used_experts(
                tokens, experts, weights, lambda e: self._expert(tokens, e), **given
            )
        else:
            alignment = row_alignment(implementation)
            y = apply_experts(tokens, experts, weights, self._experts, alignment=alignment, **given)
        y = y.reshape(x.shape)
        if self.config.shared_expert_intermediate_size:
            gate = x.astype(jnp.float32) @ self.shared_expert_gate[...].astype(jnp.float32)
            y += (jax.nn.sigmoid(gate)[..., None] * self.shared_expert(x)).astype(x.dtype)
        return y, stats

    def _route(self, x, segment_ids):
        E, A = self.config.num_experts, self.config.num_experts_per_tok
        logits = jnp.einsum(
            "btd,de->bte", x.astype(jnp.float32), self.router[...].astype(jnp.float32)
        )
        probabilities = jax.nn.softmax(logits)
        experts = jax.lax.top_k(jax.lax.stop_gradient(probabilities), A)[1]
        # Selecting by a mask keeps scatters out of the gradient.
        chosen = experts[..., None] == jnp.arange(E)
        weights = (probabilities[:, :, None] * chosen).sum(-1)
        if self.config.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdims=True)

        real = (
            jnp.ones(x.shape[:2]) if segment_ids is None else (segment_ids != 0).astype(jnp.float32)
        )
        log_norms = jax.nn.logsumexp(logits, axis=-1)
        stats = RouterStats(
            counts=(chosen * real[..., None, None]).sum((1, 2)),
            probabilities=(probabilities * real[..., None]).sum(1),
            squared_log_norms=(log_norms**2 * real).sum(1),
            tokens=real.sum(1),
        )
        return experts, weights, stats

    def _experts(self, rows, group_sizes):
        gate_up = self.gate_up_proj[...].astype(rows.dtype)
        E, D, _, F = gate_up.shape
        hidden = grouped_matmul(rows, gate_up.reshape(E, D, 2 * F), group_sizes)
        hidden = jax.nn.silu(hidden[:, :F]) * hidden[:, F:]
        return grouped_matmul(hidden, self.down_proj[...].astype(rows.dtype), group_sizes)

    def _expert(self, x, e):
        gate_up, down = self.gate_up_proj[e].astype(x.dtype), self.down_proj[e].astype(x.dtype)
        D, _, F = gate_up.shape
        hidden = x @ gate_up.reshape(D, 2 * F)
        return (jax.nn.silu(hidden[:, :F]) * hidden[:, F:]) @ down


def _equal_rows(stddev):
    """Normal directions, each expert's of the length that N(0, stddev²) entries have on average."""

    def init(key, shape):
        directions = jax.random.normal(key, shape)
        return stddev * shape[0] ** 0.5 * directions / jnp.linalg.norm(directions, axis=0)

    return init
