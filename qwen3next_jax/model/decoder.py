"""The whole model: embedding, groups of layers, final norm, head, and the MTP module beside it.

The pattern of layers repeats (three Gated DeltaNet layers, then one of full attention), so one
group is compiled once and scanned over the stacked parameters of all: compile time does not grow
with depth. Rematerialisation is per layer: with it the backward pass keeps the inputs of the layers
and computes the rest again.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from qwen3next_jax.config import ModelConfig
from qwen3next_jax.model.cache import empty_cache
from qwen3next_jax.model.layer import DecoderLayer
from qwen3next_jax.model.layers import RMSNorm, normal, weight
from qwen3next_jax.model.moe import RouterStats
from qwen3next_jax.model.mtp import MTP


class Group(nnx.Module):
    """The smallest block of layers that repeats; its parameters are stacked over the repeats."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32):
        """Builds the layers that `config.group` lists."""
        self.layers = nnx.List(
            [
                DecoderLayer(config, mixer, sparse, rngs=rngs, param_dtype=param_dtype)
                for mixer, sparse in config.group
            ]
        )


class Qwen3Next(nnx.Module):
    """A Qwen3-Next language model, or the dense Qwen3 where the config says so."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype=jnp.float32,
        dtype=None,
        remat: str = "none",
    ):
        """Builds the model with initial weights.

        Args:
          config: its shape.
          rngs: keys for the initial weights.
          param_dtype: of the stored parameters; `A_log` and `dt_bias` are float32 anyway.
          dtype: of activations and matrix products; None: `param_dtype`.
          remat: "none", or "layer": the backward pass computes each layer again.

        Raises:
          ValueError: for an unknown `remat`.
        """
        if remat not in ("none", "layer"):
            raise ValueError(f"{remat=} is unknown; expected 'none' or 'layer'")
        self.config = config
        self.dtype = jnp.dtype(dtype or param_dtype)
        self.remat = remat
        V, D = config.vocab_size, config.hidden_size
        init = normal(config.initializer_range)
        repeats = config.num_hidden_layers // len(config.group)

        @nnx.split_rngs(splits=repeats)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs):
            return Group(config, rngs=rngs, param_dtype=param_dtype)

        self.embed_tokens = weight(rngs, init, param_dtype, vocab=V, embed=D)
        self.groups = stacked(rngs)
        self.norm = RMSNorm(config, param_dtype=param_dtype)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else weight(rngs, init, param_dtype, embed=D, vocab=V)
        )
        self.mtp = MTP(config, rngs=rngs, param_dtype=param_dtype) if config.mtp_steps else None

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Predicts the next token at each position.

        Args:
          tokens: in [0, vocab_size).
          segment_ids: documents packed in a row, each a contiguous run of one id, no id twice; 0 is
            padding. None: each row is one document.
          positions: for the rotary embedding; None: they restart in each document.

        Returns:
          Logits, float32.
        """
        return self.logits(self.hidden_states(tokens, segment_ids, positions)[0])

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Embeds tokens, in the model's compute dtype."""
        return self.embed_tokens[...][tokens].astype(self.dtype)

    def head(self) -> Float[Array, "D V"]:
        """The output embedding, which may be the transposed input embedding."""
        return self.embed_tokens[...].T if self.lm_head is None else self.lm_head[...]

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Applies the head to final hidden states; float32."""
        return jnp.einsum(
            "btd,dv->btv", hidden, self.head().astype(hidden.dtype),
            preferred_element_type=jnp.float32,
        )  # fmt: skip

    def hidden_states(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        cache: Any = None,
    ) -> tuple[Float[Array, "B T D"], RouterStats | None, Any]:
        """Runs all layers.

        Args:
          tokens, segment_ids, positions: as in a call.
          cache: from `empty_cache`, or the last call's; then `positions` are needed, and are where
            each row's tokens stand in its sequence. Segment id 0 marks padding behind them.

        Returns:
          Hidden states after the final norm; router statistics of the L layers with experts, their
          fields [L, B, ...], None where no layer has any; the next cache, None without one.
        """
        if positions is None:
            positions = default_positions(tokens, segment_ids)
        graph, stacked = nnx.split(self.groups)

        def group(x, scanned):
            params, caches = scanned
            layers = nnx.merge(graph, params).layers
            stats, next_caches = [], []
            for i, layer in enumerate(layers):
                layer_cache = None if caches is None else caches[i]
                x, layer_stats, layer_cache = self._run_layer(
                    layer, x, segment_ids, positions, layer_cache
                )
                stats.append(layer_stats)
                next_caches.append(layer_cache)
            routed = [s for s in stats if s is not None]
            group_stats = jax.tree.map(lambda *s: jnp.stack(s), *routed) if routed else None
            return x, (group_stats, None if caches is None else tuple(next_caches))

        x, (stats, cache) = jax.lax.scan(group, self.embed(tokens), (stacked, cache))
        # [groups, layers with experts in a group, ...] → [layers with experts, ...]
        stats = jax.tree.map(lambda s: s.reshape(-1, *s.shape[2:]), stats)
        return self.norm(x), stats, cache

    def empty_cache(self, *, batch: int, slots: int) -> Any:
        """The cache before the first token, for sequences of up to `slots` tokens."""
        repeats = self.config.num_hidden_layers // len(self.config.group)
        caches = tuple(
            empty_cache(self.config, mixer, batch=batch, slots=slots, dtype=self.dtype)
            for mixer, _ in self.config.group
        )
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (repeats, *x.shape)), caches)

    def _run_layer(self, layer, x, segment_ids, positions, cache):
        graph, params = nnx.split(layer)

        def run(params, x, cache):
            layer = nnx.merge(graph, params)
            return layer(x, segment_ids=segment_ids, positions=positions, cache=cache)

        if self.remat == "layer":
            run = jax.checkpoint(run, prevent_cse=False)  # inside a scan nothing can be merged
        return run(params, x, cache)


def default_positions(
    tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None
) -> Int[Array, "B T"]:
    """0, 1, 2, ... from the start of each document."""
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    if segment_ids is None:
        return index
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
