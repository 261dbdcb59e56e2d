"""Multi-token prediction: one more layer that predicts the token after the next.

At position t it combines the embedding of token t + 1 with the main model's final hidden state and
predicts token t + 2; unrolled, it combines token t + 2 with its own hidden state and predicts token
t + 3, with the same weights. Embedding and output head are shared with the main model.

    h' = norm(layer(W_e norm(embed(next token)) + W_h norm(h)))

Source: DeepSeek-V3, arXiv:2412.19437, section 2.2; the order (embedding first) is Qwen3-Next's.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from qwen3next_jax.config import ModelConfig
from qwen3next_jax.model.decoder_layer import DecoderLayer
from qwen3next_jax.model.layers import RMSNorm, normal, project, weight
from qwen3next_jax.model.statistics import Observed
from qwen3next_jax.ops.shapes import check_hidden, check_shape
from qwen3next_jax.parallel.mesh import all_gathered


class MTP(nnx.Module):
    """One step of multi-token prediction."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype=jnp.float32,
        moe_buffer_factor: float = -1.0,
    ):
        """Builds the module: a full-attention layer, with experts where the model has them."""
        D = config.hidden_size
        self.pre_fc_norm_embedding = RMSNorm(config, param_dtype=param_dtype)
        self.pre_fc_norm_hidden = RMSNorm(config, param_dtype=param_dtype)
        init = normal(config.initializer_range)
        self.fc = weight(rngs, init, param_dtype, pair=2, embed=D, embed__out=D)
        self.layer = DecoderLayer(
            config,
            *config.mtp_layer,
            rngs=rngs,
            param_dtype=param_dtype,
            moe_buffer_factor=moe_buffer_factor,
        )
        self.norm = RMSNorm(config, param_dtype=param_dtype)

    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        next_embeddings: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        cache: Any = None,
        observed: Observed | None = None,
    ) -> tuple[Float[Array, "B T D"], Any, Any]:
        """Takes one step.

        Args:
          hidden: the main model's hidden states after its final norm, or the last step's result.
          next_embeddings: at each position, the embedding of the first token not yet in `hidden`.
          segment_ids, positions, cache, observed: as `DecoderLayer.__call__` takes them.

        Returns:
          The next hidden states, for the shared head and for a further step; the router's
          statistics, None without experts; the next cache, None without one.

        Raises:
          ValueError: hidden or next_embeddings is not [B, T, D].
        """
        check_hidden("hidden", hidden, self.fc.shape[1])
        check_shape("next_embeddings", next_embeddings, *hidden.shape)
        fc = all_gathered(self.fc, hidden.dtype)
        x = project(self.pre_fc_norm_embedding(next_embeddings), fc[0])
        x += project(self.pre_fc_norm_hidden(hidden), fc[1])
        x, stats, cache = self.layer(
            x, segment_ids=segment_ids, positions=positions, cache=cache, observed=observed
        )
        return self.norm(x), stats, cache
