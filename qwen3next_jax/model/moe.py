"""The ultra-sparse mixture of experts: of E experts each token uses A, and one shared by all.

    p = softmax(x W_r);  y = Σ_{e in top A of p} (p_e / Σ p) expert_e(x) + sigmoid(x w_s) shared(x)

The router is float32 throughout. Its rows start with equal norms, so that no expert is favoured
before anything is learnt.

On a mesh each device routes its own tokens and sorts them for itself; the tokens then travel to
their experts' devices (`parallel/expert.py`), or where each device has all experts, only the
experts' matrices are put together from their slices. The shared expert waits for none of that.
"""

import functools
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
    gather_slices,
    gathered,
    partition,
    sum_columns,
)


class RouterStats(NamedTuple):
    """What the router did, by row of the batch, padding not counted; the loss makes more of it."""

    counts: Float[Array, "*L B E"]  # assignments to each expert
    probabilities: Float[Array, "*L B E"]  # sums of the router's probabilities
    squared_log_norms: Float[Array, "*L B"]  # sums of logsumexp(logits)², for the z-loss
    entropies: Float[Array, "*L B"]  # sums of the entropies of the probabilities, in nats
    tokens: Float[Array, "*L B"]
    dropped: Float[Array, "*L B_ways T_ways"]  # of each device's assignments, those without place


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
          config: its expert fields are read.
          rngs: keys for the initial weights.
          param_dtype: of the stored parameters.
          moe_buffer_factor: where experts are split over devices, how many assignments a device can
            receive, as a multiple of an even load; -1: any number, so that none is ever dropped.

        Raises:
          ValueError: the config is of a dense model.
        """
        if not config.num_experts:
            raise ValueError("This config has num_experts=0; give that of a model with experts")
        D, E, F = config.hidden_size, config.num_experts, config.moe_intermediate_size
        self.config, self.moe_buffer_factor = config, moe_buffer_factor
        init = normal(config.initializer_range)
        router = (
            _equal_rows(config.initializer_range) if config.router_init == "normalized" else init
        )
        self.router = weight(rngs, router, param_dtype, embed=D, router=E)
        self.gate_up_proj = weight(
            rngs, init, param_dtype, experts=E, pair=2, embed=D, expert_mlp=F
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
        observed: Observed | None = None,
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """Like a call, with the router's statistics over all tokens but padding (segment id 0).

        `observed`, where given, gets the statistic `shared_gate`.

        Raises:
          ValueError: x is not [B, T, D] in floats or holds no token, or segment_ids are not [B, T].
        """
        check_hidden("x", x, self.config.hidden_size, segment_ids=segment_ids)
        x = jnp.asarray(x)  # numpy's arrays have no `at`
        mesh = active_mesh()
        params = (self.router[...], self.gate_up_proj[...], self.down_proj[...])
        if segment_ids is None:
            segment_ids = jnp.ones(x.shape[:2], jnp.int32)
        if mesh is None:
            y, stats = self._on_one_device(x, segment_ids, *params)
        else:
            y, stats = self._on_mesh(mesh, x, segment_ids, *params)
        if self.config.shared_expert_intermediate_size:
            gate_row = gathered(self.shared_expert_gate, jnp.float32)
            gate = jax.nn.sigmoid(jnp.dot(x.astype(jnp.float32), gate_row, precision=_float32()))
            y += (gate[..., None] * self.shared_expert(x)).astype(x.dtype)
            if observed is not None:
                observed["shared_gate"] = token_mean(gate, segment_ids)
        return y, stats

    def _on_one_device(self, x, segment_ids, router, gate_up, down):
        experts, weights, stats = self._route(x, segment_ids, router)
        tokens, experts, weights = (a.reshape(-1, a.shape[-1]) for a in (x, experts, weights))
        alignment = self._alignment(len(tokens))
        compute = self._compute(gate_up, down, tokens, alignment)
        y = apply_experts(
            tokens, experts, weights, compute,
            num_experts=self.config.num_experts, alignment=alignment,
        )  # fmt: skip
        return y.reshape(x.shape), stats

    def _compute(self, gate_up, down, tokens, alignment):
        expected = len(tokens) * self.config.num_experts_per_tok
        return functools.partial(
            _experts, gate_up=gate_up, down=down, block=alignment, expected_rows=expected
        )

    def _alignment(self, tokens):
        E, A = self.config.num_experts, self.config.num_experts_per_tok
        return row_alignment(mean=tokens * A / E, most=tokens)

    def _on_mesh(self, mesh, x, segment_ids, *params):
        def spec(*axes, of):
            return partition("mlp", axes, of.shape, mesh.shape)

        row, rows = spec("batch", of=x[:, 0, 0]), spec("batch", "tokens", of=segment_ids)
        specs = tuple(
            spec(*param.axes, of=param[...])
            for param in (self.router, self.gate_up_proj, self.down_proj)
        )
        stats_specs = RouterStats._make((row, row, row, row, row, BATCH))
        return jax.shard_map(
            functools.partial(self._on_a_device, specs=specs),
            in_specs=(rows, rows, *specs), out_specs=(rows, stats_specs), check_vma=False,
        )(x, segment_ids, *params)  # fmt: skip

    def _on_a_device(self, x, segment_ids, *params, specs):
        """Inside `shard_map`: this device's tokens, and its slices of the parameters."""
        router = gather_slices(params[0].astype(jnp.float32), specs[0])
        gate_up, down = (
            gather_slices(w.astype(x.dtype), spec, keep=("expert",))
            for w, spec in zip(params[1:], specs[1:], strict=True)
        )
        experts, weights, stats = self._route(x, segment_ids, router)
        tokens, experts, weights = (a.reshape(-1, a.shape[-1]) for a in (x, experts, weights))
        # A device's experts get rows from all devices that share the experts out.
        alignment = self._alignment(len(tokens) * jax.lax.axis_size("expert"))
        compute = self._compute(gate_up, down, tokens, alignment)
        given: dict[str, Any] = dict(num_experts=self.config.num_experts, alignment=alignment)
        if jax.lax.axis_size("expert") == 1:
            y, dropped = apply_experts(tokens, experts, weights, compute, **given), jnp.zeros(())
        else:
            # Padding, all of it alike, would fill the buffers of the same few devices.
            real = segment_ids.reshape(-1, 1) != 0
            experts = jnp.where(real, experts, self.config.num_experts)
            y, dropped = apply_split_experts(
                tokens, experts, weights, compute, axis="expert",
                buffer_factor=self.moe_buffer_factor,
                exchange="dense" if platform() == "cpu" else "ragged", **given,
            )  # fmt: skip
        # Each device of `tensor` has made its columns' share of y, from all of its row's tokens.
        y = sum_columns(y.reshape(x.shape))
        by_row = jax.tree.map(lambda s: jax.lax.psum(s, "context"), stats)
        return y, by_row._replace(dropped=dropped.astype(jnp.float32).reshape(1, 1))

    def _route(self, x, segment_ids, router):
        E, A = self.config.num_experts, self.config.num_experts_per_tok
        x, router = x.astype(jnp.float32), router.astype(jnp.float32)
        logits = project(x, router, precision=_float32())
        probabilities = jax.nn.softmax(logits)
        experts = jax.lax.top_k(jax.lax.stop_gradient(probabilities), A)[1]
        # Selecting by a mask keeps scatters out of the gradient.
        chosen = experts[..., None] == jnp.arange(E)
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
            squared_log_norms=once(_sum_over_tokens, log_norms**2, real),
            entropies=(entropies * real).sum(1),
            tokens=real.sum(1),
            dropped=jnp.zeros((1, 1)),
        )
        return experts, weights, stats


def _sum_over_tokens(x, weights):
    return (x * jnp.expand_dims(weights, range(2, x.ndim))).sum(1)


def _float32() -> jax.lax.Precision:
    """The precision at which products keep float32 weights; the default rounds them."""
    # HIGH is TF32 on a GPU. On a TPU it is three passes, which take all of a bfloat16 token and 16
    # bits of the weights; HIGHEST would be six.
    return jax.lax.Precision.HIGH if platform() == "tpu" else jax.lax.Precision.HIGHEST


def _experts(rows, weights, group_sizes, *, gate_up, down, block, expected_rows):
    gate_up, down = gate_up.astype(rows.dtype), down.astype(rows.dtype)
    return expert_mlp(
        rows, weights, gate_up, down, group_sizes, block=block, expected_rows=expected_rows
    )


def _equal_rows(stddev):
    """Normal directions, each expert's of the length that N(0, stddev²) entries have on average."""

    def init(key, shape):
        directions = jax.random.normal(key, shape)
        return stddev * shape[0] ** 0.5 * directions / jnp.linalg.norm(directions, axis=0)

    return init
