"""The ultra-sparse mixture of experts: each token uses A of E experts, and one shared by all.

    p = softmax(x W_r);  y = Σ_{e in top A of p} (p_e / Σ p) expert_e(x) + sigmoid(x w_s) shared(x)

The router is float32 throughout. With `router_init` "normalized" its columns, one an expert, start
with equal norms, so that initially no expert is favoured.

On a mesh each device routes and sorts its own tokens, which are then sent to their experts' devices
(`parallel/expert.py`). If each device has all experts, no tokens are sent: only the shards of the
experts' matrices are gathered. The shared expert depends on none of that.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from qwen3next_jax.config import ModelConfig
from qwen3next_jax.model.layers import MLP, normal, project, weight
from qwen3next_jax.model.statistics import Observed, token_mean
from qwen3next_jax.ops.cpu import once
from qwen3next_jax.ops.expert_mlp import expert_mlp
from qwen3next_jax.ops.grouped_matmul import row_alignment
from qwen3next_jax.ops.platform import platform
from qwen3next_jax.ops.shapes import check_hidden
from qwen3next_jax.parallel.expert import apply_experts, apply_split_experts
from qwen3next_jax.parallel.mesh import (
    BATCH,
    active_mesh,
    all_gathered,
    gather_slices,
    partition,
    sum_columns,
)


class RouterStats(NamedTuple):
    """What the router did, summed over the tokens of each row; padding is not counted."""

    counts: Float[Array, "*L B E"]  # assignments to each expert
    probabilities: Float[Array, "*L B E"]  # sums of the router's probabilities
    squared_lse: Float[Array, "*L B"]  # sums of logsumexp(logits)², for the z-loss
    entropies: Float[Array, "*L B"]  # sums of the entropies of the probabilities, in nats
    tokens: Float[Array, "*L B"]  # number of tokens
    dropped: Float[Array, "*L B_ways T_ways"]  # dropped assignments of each device's tokens


class SparseMoE(nnx.Module):
    """Top-k routed experts plus a gated shared expert."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype=jnp.float32,
        moe_buffer_factor: float = -1.0,
    ):
        """Builds the layer.

        Args:
          config: the model's config, of which the expert fields are used.
          rngs: keys for the initial weights.
          param_dtype: dtype of the parameters.
          moe_buffer_factor: if experts are sharded over devices, how many assignments a device can
            receive, as a multiple of an even load; -1: any number, so that none is ever dropped.

        Raises:
          ValueError: the config is of a dense model.
        """
        if not config.num_experts:
            raise ValueError("This config has num_experts=0; give that of a model with experts")
        D, E, F = config.hidden_size, config.num_experts, config.moe_intermediate_size
        self.config, self.moe_buffer_factor = config, moe_buffer_factor
        init = normal(config.initializer_range)
        normalized = config.router_init == "normalized"
        router_init = _equal_norm_columns(config.initializer_range) if normalized else init
        self.router = weight(rngs, router_init, param_dtype, embed=D, router=E)
        self.gate_up_proj = weight(
            rngs, init, param_dtype, experts=E, pair=2, embed=D, expert_mlp=F
        )
        self.down_proj = weight(rngs, init, param_dtype, experts=E, expert_mlp=F, embed=D)
        if width := config.shared_expert_intermediate_size:
            self.shared_expert = MLP(config, width, rngs=rngs, param_dtype=param_dtype)
            self.shared_expert_gate = weight(rngs, init, param_dtype, embed=D)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Maps each token by itself; `with_stats` also returns what the router did."""
        return self.with_stats(x)[0]

    def with_stats(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        observed: Observed | None = None,
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """Maps each token by itself.

        Args:
          x: hidden states.
          segment_ids: 0 for padding, which is not counted in statistics; None: no padding.
          observed: dict to which the statistic `shared_gate` is added.

        Returns:
          y in x's dtype, and the router's statistics.

        Raises:
          ValueError: x is not a float array [B, T, D] or has no tokens, or segment_ids are not
            [B, T].
        """
        check_hidden("x", x, self.config.hidden_size, segment_ids=segment_ids)
        x = jnp.asarray(x)  # numpy's arrays have no `at`
        mesh = active_mesh()
        params = (self.router[...], self.gate_up_proj[...], self.down_proj[...])
        if segment_ids is None:
            segment_ids = jnp.ones(x.shape[:2], jnp.int32)
        if mesh is None:
            y, stats = self._apply(x, segment_ids, *params)
        else:
            y, stats = self._sharded(mesh, x, segment_ids, *params)
        if self.config.shared_expert_intermediate_size:
            gate_row = all_gathered(self.shared_expert_gate, jnp.float32)
            logit = jnp.dot(x.astype(jnp.float32), gate_row, precision=_router_precision())
            gate = jax.nn.sigmoid(logit)
            y += (gate[..., None] * self.shared_expert(x).astype(jnp.float32)).astype(x.dtype)
            if observed is not None:
                observed["shared_gate"] = token_mean(gate, segment_ids)
        return y, stats

    def _apply(self, x, segment_ids, router, gate_up, down, *, ways=1):
        """Routes tokens to experts that `ways` devices share, and sums what these return.

        Returns y in x's shape, and the router's statistics of these tokens.
        """
        E, A = self.config.num_experts, self.config.num_experts_per_tok
        experts, weights, stats = self._route(x, segment_ids, router)
        tokens, experts, weights = (a.reshape(-1, a.shape[-1]) for a in (x, experts, weights))
        most = len(tokens) * ways  # a device's experts receive rows from all of them
        alignment = row_alignment(mean=most * A / E, most=most)

        def compute(rows, weights, group_sizes):
            return expert_mlp(
                rows,
                weights,
                gate_up.astype(rows.dtype),
                down.astype(rows.dtype),
                group_sizes,
                block=alignment,
                expected_rows=len(tokens) * A,
            )

        options: dict[str, Any] = dict(num_experts=E, alignment=alignment)
        if ways == 1:
            y, dropped = apply_experts(tokens, experts, weights, compute, **options), jnp.zeros(())
        else:
            # Padding is not sent: all of it would be routed alike, and fill the receive buffers of
            # the same few devices.
            experts = jnp.where(segment_ids.reshape(-1, 1) != 0, experts, E)
            y, dropped = apply_split_experts(
                tokens,
                experts,
                weights,
                compute,
                axis="expert",
                buffer_factor=self.moe_buffer_factor,
                exchange="dense" if platform() == "cpu" else "ragged",
                **options,
            )
        stats = stats._replace(dropped=dropped.astype(jnp.float32).reshape(1, 1))
        return y.reshape(x.shape), stats

    def _sharded(self, mesh, x, segment_ids, *params):
        def spec(axes, shape):
            return partition("mlp", axes, shape, mesh.shape)

        row, rows = spec(("batch",), x.shape[:1]), spec(("batch", "tokens"), x.shape[:2])
        specs = [
            spec(param.axes, param.shape)
            for param in (self.router, self.gate_up_proj, self.down_proj)
        ]

        def local(x, segment_ids, router, gate_up, down):
            """On a device's tokens and its shards of the parameters."""
            router = gather_slices(router.astype(jnp.float32), specs[0])
            gate_up = gather_slices(gate_up.astype(x.dtype), specs[1], keep=("expert",))
            down = gather_slices(down.astype(x.dtype), specs[2], keep=("expert",))
            ways = jax.lax.axis_size("expert")
            y, stats = self._apply(x, segment_ids, router, gate_up, down, ways=ways)
            # Each device along `tensor` holds partial sums of y, over its columns of the experts.
            y = sum_columns(y)
            of_rows = jax.tree.map(lambda s: jax.lax.psum(s, "context"), stats)
            return y, of_rows._replace(dropped=stats.dropped)  # each device has its own

        of_stats = RouterStats._make(
            BATCH if name == "dropped" else row for name in RouterStats._fields
        )
        return jax.shard_map(
            local,
            in_specs=(rows, rows, *specs),
            out_specs=(rows, of_stats),
            check_vma=False,
        )(x, segment_ids, *params)

    def _route(self, x, segment_ids, router):
        E, A = self.config.num_experts, self.config.num_experts_per_tok
        x, router = x.astype(jnp.float32), router.astype(jnp.float32)
        logits = project(x, router, precision=_router_precision())
        probabilities = jax.nn.softmax(logits)
        experts = jax.lax.top_k(jax.lax.stop_gradient(probabilities), A)[1]
        # A mask rather than a gather, whose gradient would be a scatter.
        chosen = (experts[..., None] == jnp.arange(E)).astype(jnp.float32)
        weights = (probabilities[:, :, None] * chosen).sum(-1)
        if self.config.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdims=True)

        real = (segment_ids != 0).astype(jnp.float32)
        log_norms = jax.nn.logsumexp(logits, axis=-1)
        entropies = jax.lax.stop_gradient(log_norms - (probabilities * logits).sum(-1))
        # `once`, because the gradients of these sums are slices of an array of all layers. Fused
        # into the softmax's gradient they would make its kernels different ones in each layer, and
        # XLA:CPU compiles equal kernels only once.
        stats = RouterStats(
            counts=(chosen * real[..., None, None]).sum((1, 2)),
            probabilities=once(_sum_over_tokens, probabilities, real),
            squared_lse=once(_sum_over_tokens, log_norms**2, real),
            entropies=(entropies * real).sum(1),
            tokens=real.sum(1),
            dropped=jnp.zeros((1, 1), jnp.float32),
        )
        return experts, weights, stats


def _sum_over_tokens(x, weights):
    return (x * jnp.expand_dims(weights, range(2, x.ndim))).sum(1)


def _router_precision() -> jax.lax.Precision:
    """The precision of products with float32 weights, which the default precision would round."""
    # On a TPU, HIGH is three bfloat16 passes, which use all bits of a bfloat16 token and 16 bits of
    # the weights; HIGHEST would be six. On a GPU, HIGH would be TF32.
    return jax.lax.Precision.HIGH if platform() == "tpu" else jax.lax.Precision.HIGHEST


def _equal_norm_columns(stddev):
    """Gaussian columns, all scaled to the root mean square norm of N(0, stddev²) columns."""

    def init(key, shape):
        directions = jax.random.normal(key, shape)
        return stddev * shape[0] ** 0.5 * directions / jnp.linalg.norm(directions, axis=0)

    return init
