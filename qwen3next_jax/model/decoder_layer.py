"""One decoder layer: x + mixer(norm(x)), then x + mlp(norm(x))."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from qwen3next_jax.config import LINEAR, ModelConfig
from qwen3next_jax.model.gated_attention import GatedAttention
from qwen3next_jax.model.gated_delta_net import GatedDeltaNet
from qwen3next_jax.model.layers import MLP, RMSNorm
from qwen3next_jax.model.moe import RouterStats, SparseMoE
from qwen3next_jax.model.statistics import Observed, largest
from qwen3next_jax.parallel.mesh import constrain


class DecoderLayer(nnx.Module):
    """A token mixer and a feed-forward, each behind a norm and beside a residual."""

    def __init__(
        self,
        config: ModelConfig,
        mixer: str,
        sparse: bool,
        *,
        rngs: nnx.Rngs,
        param_dtype=jnp.float32,
        moe_buffer_factor: float = -1.0,
    ):
        """Builds a layer.

        Args:
          config: the model's.
          mixer: "linear_attention" (Gated DeltaNet) or "full_attention".
          sparse: experts rather than a dense feed-forward.
          rngs: keys for the initial weights.
          param_dtype: of the stored parameters.
          moe_buffer_factor: see `SparseMoE`.
        """
        made = dict(rngs=rngs, param_dtype=param_dtype)
        self.input_layernorm = RMSNorm(config, param_dtype=param_dtype)
        if mixer == LINEAR:
            self.linear_attn = GatedDeltaNet(config, **made)
        else:
            self.self_attn = GatedAttention(config, **made)
        self.post_attention_layernorm = RMSNorm(config, param_dtype=param_dtype)
        if sparse:
            self.mlp: SparseMoE | MLP = SparseMoE(
                config, moe_buffer_factor=moe_buffer_factor, **made
            )
        else:
            self.mlp = MLP(config, config.intermediate_size, **made)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        cache: Any = None,
        draft: bool = False,
        observed: Observed | None = None,
    ) -> tuple[Float[Array, "B T D"], RouterStats | None, Any]:
        """Returns the next hidden states, the router's statistics and the next cache, or None.

        With `draft`, which needs a cache, the next cache can give tokens back (`model/cache.py`).
        `observed`, where given, gets the statistics of the modules and `activation_max`, the
        largest entry of the next hidden states.
        """
        given: dict[str, Any] = dict(
            segment_ids=segment_ids, positions=positions, cache=cache, observed=observed
        )
        if hasattr(self, "linear_attn"):
            mixed = self.linear_attn(self.input_layernorm(x), draft=draft, **given)
        else:
            mixed = self.self_attn(self.input_layernorm(x), **given)
        if cache is not None:
            mixed, cache = mixed
        x = constrain(x + mixed, "batch", "tokens", "hidden")
        normed, stats = self.post_attention_layernorm(x), None
        if isinstance(self.mlp, SparseMoE):
            out, stats = self.mlp.with_stats(normed, segment_ids=segment_ids, observed=observed)
        else:
            out = self.mlp(normed)
        x = constrain(x + out, "batch", "tokens", "hidden")
        if observed is not None:
            observed["activation_max"] = largest(x, segment_ids)
        return x, stats, cache
