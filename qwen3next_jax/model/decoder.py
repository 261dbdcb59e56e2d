"""The whole model: embedding, groups of layers, final norm, head, and the MTP module beside it.

The pattern of layers repeats (three Gated DeltaNet layers, then one of full attention), so one
group is compiled once and scanned over the stacked parameters of all: compile time does not grow
with depth. Rematerialisation is per layer: with it the backward pass keeps the inputs of the layers
and computes the rest again.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from qwen3next_jax.config import REMAT, ModelConfig
from qwen3next_jax.model.cache import empty_cache
from qwen3next_jax.model.decoder_layer import DecoderLayer
from qwen3next_jax.model.layers import RMSNorm, normal, project, weight
from qwen3next_jax.model.moe import RouterStats
from qwen3next_jax.model.mtp import MTP
from qwen3next_jax.model.statistics import Observed, one_after_another
from qwen3next_jax.ops.attention import KEPT
from qwen3next_jax.ops.platform import platform
from qwen3next_jax.ops.shapes import check_rows, check_shape
from qwen3next_jax.parallel.vocabulary import embed

_MOST_UNROLLED = 4  # groups in a row, as what is unrolled is compiled anew each time


class Group(nnx.Module):
    """The smallest block of layers that repeats; its parameters are stacked over the repeats."""

    def __init__(self, config: ModelConfig, **options: Any):
        """Builds the layers that `config.group` lists, with `DecoderLayer`'s options."""
        self.layers = nnx.List(
            [DecoderLayer(config, mixer, sparse, **options) for mixer, sparse in config.group]
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
        moe_buffer_factor: float = -1.0,
    ):
        """Builds the model with initial weights.

        Args:
          config: its shape.
          rngs: keys for the initial weights.
          param_dtype: of the stored parameters; `A_log` and `dt_bias` are float32 anyway.
          dtype: of activations and matrix products; None: `param_dtype`.
          remat: what the backward pass computes again: "none", each "layer", or
            "layer_but_attention": each but for attention's scores, whose results it keeps.
          moe_buffer_factor: where experts are split over devices, see `SparseMoE`.

        Raises:
          ValueError: for an unknown `remat`.
        """
        if remat not in REMAT:
            raise ValueError(f"{remat=} is unknown; expected one of {', '.join(REMAT)}")
        self.config = config
        self.dtype = jnp.dtype(dtype or param_dtype)
        self.remat = remat
        V, D = config.vocab_size, config.hidden_size
        init = normal(config.initializer_range)
        repeats = config.num_hidden_layers // len(config.group)
        options: dict[str, Any] = dict(param_dtype=param_dtype, moe_buffer_factor=moe_buffer_factor)

        @nnx.split_rngs(splits=repeats)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs):
            return Group(config, rngs=rngs, **options)

        self.embed_tokens = weight(rngs, init, param_dtype, vocab=V, embed=D)
        self.groups = stacked(rngs)
        self.norm = RMSNorm(config, param_dtype=param_dtype)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else weight(rngs, init, param_dtype, embed=D, vocab=V)
        )
        self.mtp = MTP(config, rngs=rngs, **options) if config.mtp_steps else None

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

        Raises:
          ValueError: one of them is no array [B, T].
        """
        return self.logits(self.hidden_states(tokens, segment_ids, positions)[0])

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Embeds tokens, in the model's compute dtype."""
        return embed(tokens, self.embed_tokens[...], dtype=self.dtype)

    def head(self) -> Float[Array, "D V"]:
        """The output embedding, which may be the transposed input embedding."""
        return self.embed_tokens[...].T if self.lm_head is None else self.lm_head[...]

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Applies the head to final hidden states; float32."""
        head = self.head().astype(hidden.dtype)
        if platform() == "cpu":
            # XLA would fuse the end of the last layer into this product and compute it for each
            # tile of the vocabulary. It removes optimization barriers before that, so this is a
            # select that it cannot remove, as it cannot know that no entry of the head is NaN.
            entry = jax.lax.stop_gradient(head[0, 0])
            hidden = jnp.where(jnp.isnan(entry), entry, hidden)
        return project(hidden, head, into=jnp.float32)

    def hidden_states(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        observed: Observed | None = None,
    ) -> tuple[Float[Array, "B T D"], RouterStats | None]:
        """Runs all layers.

        Args:
          tokens, segment_ids, positions: as in a call.
          observed: where given, gets the layers' statistics, each stacked over those that know it.

        Returns:
          Hidden states after the final norm; router statistics of the L layers with experts, their
          fields [L, B, ...], None where no layer has any.

        Raises:
          ValueError: tokens, segment_ids or positions are no array [B, T]; or the model is an
            `unstacked` one.
        """
        self.require_stacked()
        check_shape("tokens", tokens, "B", "T")
        check_rows(tokens.shape, segment_ids=segment_ids, positions=positions)
        if positions is None:
            positions = default_positions(tokens, segment_ids)
        # Grouped by graph definition, by which a module that a user has replaced differs.
        alike = [list(same) for _, same in itertools.groupby(self.groups.layers, nnx.graphdef)]
        graphs = [nnx.graphdef(layers[0]) for layers in alike]
        params: list[Any] = [[nnx.state(layer) for layer in layers] for layers in alike]
        if self.remat != "none":
            # `_run_alike` scans over them. Stacked inside the scan over groups, they would be kept
            # for the backward pass a second time.
            params = [
                jax.tree.map(lambda *p: jnp.stack(p, axis=1), *of_layers) for of_layers in params
            ]

        def group(x, params):
            all_stats, all_seen = [], []
            for graph, layers in zip(graphs, params, strict=True):
                x, stats, seen = self._run_alike(
                    graph, layers, x, segment_ids, positions, observed is not None
                )
                all_seen.append(seen)
                if stats is not None:
                    all_stats.append(stats)
            joined = jax.tree.map(lambda *s: jnp.concatenate(s), *all_stats) if all_stats else None
            return x, (joined, one_after_another(all_seen))

        # On a CPU, a loop copies each group's residuals into an array of all groups' residuals.
        unroll = _MOST_UNROLLED if platform() == "cpu" else 1
        x, by_group = jax.lax.scan(group, self.embed(tokens), params, unroll=unroll)
        # [groups, layers of a group that have it, ...] → [layers that have it, ...]
        stats, seen = jax.tree.map(lambda s: s.reshape(-1, *s.shape[2:]), by_group)
        if observed is not None:
            observed.update(seen)
        return self.norm(x), stats

    def empty_cache(self, *, batch: int, slots: int) -> list[Any]:
        """The layers' caches before the first token, for sequences of up to `slots` tokens."""
        return [
            empty_cache(self.config, mixer, batch=batch, slots=slots, dtype=self.dtype)
            for mixer in self.config.mixers
        ]

    def extend(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        cache: list[Any],
        *,
        draft: bool = False,
    ) -> tuple[Float[Array, "B T D"], list[Any]]:
        """Runs all layers over the next tokens of sequences.

        Layers are not scanned here but follow one another: a scan would copy every parameter and
        every cached key at each token.

        Args:
          tokens: in [0, vocab_size).
          segment_ids: 1 for tokens, 0 for padding behind them.
          positions: of each row, T neighbouring positions from where its sequence goes on; the
            cache must have slots for all of them, padding included.
          cache: from `empty_cache`, or the last call's.
          draft: some of the tokens may be taken back: `cache.keep` says how many stay.

        Returns:
          Hidden states after the final norm, and the next cache.
        """
        x, next_cache = self.embed(tokens), []
        for layer, layer_cache in zip(self._layers(), cache, strict=True):
            x, _, layer_cache = layer(
                x, segment_ids=segment_ids, positions=positions, cache=layer_cache, draft=draft
            )
            next_cache.append(layer_cache)
        return self.norm(x), next_cache

    def _layers(self) -> Iterator[DecoderLayer]:
        """All layers in order, as `extend` needs them."""
        for group in self.groups if self.is_unstacked else _apart(self.groups):
            yield from group.layers

    @property
    def is_unstacked(self) -> bool:
        """Whether this is an `unstacked` copy."""
        return isinstance(self.groups, nnx.List)

    def require_stacked(self) -> None:
        """Refuses, by a ValueError, an `unstacked` copy."""
        if self.is_unstacked:
            raise ValueError(
                "An unstacked model is for generation alone; load or build it without `unstacked`"
            )

    def unstacked(self) -> "Qwen3Next":
        """A copy for `extend`, with each group's parameters in arrays of their own.

        Cut out of the stacked arrays at each call, they would be copied each time. A checkpoint can
        be loaded in this form (`load_checkpoint`), which takes the memory of one copy.
        """
        graph, params = nnx.split(self)
        model = nnx.merge(graph, params)
        model.groups = nnx.List(_apart(self.groups))
        return model

    def _run_alike(self, graph, params, x, segment_ids, positions, observing):
        """Runs neighbouring layers that have the same graph definition.

        Args:
          graph: that of each layer.
          params: of the layers, a list; with rematerialisation one state, stacked.
          x, segment_ids, positions: as the layers take them.
          observing: whether to collect statistics.

        Returns:
          x behind the last layer; the router's statistics and the observed ones of all layers,
          stacked, None without experts and {} unless `observing`.
        """

        def run(x, params):
            layer = nnx.merge(graph, params)
            seen: Observed | None = {} if observing else None
            x, stats, _ = layer(x, segment_ids=segment_ids, positions=positions, observed=seen)
            return x, (stats, seen or {})

        if self.remat == "none":
            by_layer = []
            for layer_params in params:
                x, of_layer = run(x, layer_params)
                by_layer.append(of_layer)
            return x, *jax.tree.map(lambda *s: jnp.stack(s), *by_layer)
        # Compiled once for all of them. The barriers that `checkpoint` sets make a layer wait for
        # its turn in the backward pass: left to itself, a TPU's scheduler computes a whole group
        # again before it uses any of it.
        kept = (KEPT,) if self.remat == "layer_but_attention" else ()
        policy = jax.checkpoint_policies.save_only_these_names(*kept)
        x, (stats, seen) = jax.lax.scan(jax.checkpoint(run, policy=policy), x, params)
        return x, stats, seen


def _apart(stacked: Group) -> list[Group]:
    graph, params = nnx.split(stacked)
    repeats = jax.tree.leaves(params)[0].shape[0]
    return [nnx.merge(graph, jax.tree.map(lambda p, i=i: p[i], params)) for i in range(repeats)]


def default_positions(
    tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None
) -> Int[Array, "B T"]:
    """0, 1, 2, ... from the start of each document."""
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    if segment_ids is None:
        return index
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
