"""One decoder layer: x + mixer(norm(x)), then x + mlp(norm(x))."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from qwen3next_jax.config import FULL, LINEAR, ModelConfig, require_known
from qwen3next_jax.model.gated_attention import GatedAttention
from qwen3next_jax.model.gated_delta_net import GatedDeltaNet
from qwen3next_jax.model.layers import MLP, RMSNorm
from qwen3next_jax.model.moe import RouterStats, SparseMoE
from qwen3next_jax.model.statistics import Observed, largest
from qwen3next_jax.parallel.mesh import constrain


class DecoderLayer(nnx.Module):
    """A token mixer and a feed-forward, each after a norm and with a residual connection."""

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
          config: the model's config.
          mixer: "linear_attention" (Gated DeltaNet) or "full_attention".
          sparse: whether the feed-forward is a mixture of experts rather than dense.
          rngs: keys for the initial weights.
          param_dtype: dtype of the parameters.
          moe_buffer_factor: see `SparseMoE`.

        Raises:
          ValueError: for an unknown mixer.
        """
        require_known("mixer", [mixer], (LINEAR, FULL))
        options: dict[str, Any] = dict(rngs=rngs, param_dtype=param_dtype)
        self.input_layernorm = RMSNorm(config, param_dtype=param_dtype)
        if mixer == LINEAR:
            self.linear_attn = GatedDeltaNet(config, **options)
        else:
            self.self_attn = GatedAttention(config, **options)
        self.post_attention_layernorm = RMSNorm(config, param_dtype=param_dtype)
        if sparse:
            self.mlp: SparseMoE | MLP = SparseMoE(
                config, moe_buffer_factor=moe_buffer_factor, **options
            )
        else:
            self.mlp = MLP(config, config.intermediate_size, **options)

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
        """Runs the layer.

        Args:
          x: hidden states.
          segment_ids, positions, cache: as the mixer takes them.
          draft: with a cache, whether some of the tokens may be rejected (`model/cache.py`).
          observed: dict to which the modules' statistics are added, and `activation_max`, the
            largest absolute entry of the next hidden states.

        Returns:
          The next hidden states; the router's statistics, None without experts; the next cache,
          None without one.
        """
        inputs: dict[str, Any] = dict(
            segment_ids=segment_ids, positions=positions, cache=cache, observed=observed
        )
        if hasattr(self, "linear_attn"):
            mixed = self.linear_attn(self.input_layernorm(x), draft=draft, **inputs)
        else:
            mixed = self.self_attn(self.input_layernorm(x), **inputs)
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
