"""The whole model: embedding, groups of layers, final norm, head, and the MTP module.

The pattern of layers repeats (three Gated DeltaNet layers, then one of full attention), so one
group is compiled and scanned over the stacked parameters of all groups: compile time does not grow
with depth. With `remat`, only the layers' inputs are saved for the backward pass, which recomputes
each layer from its own.
"""

import functools
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
from qwen3next_jax.model.statistics import Observed, concatenate_layers
from qwen3next_jax.ops.attention import KEPT
from qwen3next_jax.ops.platform import platform
from qwen3next_jax.ops.segments import default_positions
from qwen3next_jax.ops.shapes import check_rows, check_shape
from qwen3next_jax.parallel.vocabulary import embed

_MOST_UNROLLED = 4  # groups; every unrolled copy costs compile time


class _Group(nnx.Module):
    """The smallest block of layers that repeats.

    Its parameters are stacked over the repeats, unless the model is `unstacked`.
    """

    def __init__(self, config: ModelConfig, **options: Any):
        """Builds the layers that `config.group` lists, with `DecoderLayer`'s options."""
        self.layers = nnx.List(
            [DecoderLayer(config, mixer, sparse, **options) for mixer, sparse in config.group]
        )


class Qwen3Next(nnx.Module):
    """A Qwen3-Next language model, or the dense Qwen3 where the config says so.

    `dtype` and `remat`, which `__init__` describes, may also be set later, as on a loaded model.
    """

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
          config: sizes and options of the model.
          rngs: keys for the initial weights.
          param_dtype: dtype of the parameters; `A_log` and `dt_bias` are float32 in any case.
          dtype: dtype of activations and matrix products; None: `param_dtype`.
          remat: what the backward pass recomputes: "none", each "layer", or "layer_but_attention":
            each layer except the outputs of attention, which are saved.
          moe_buffer_factor: room for experts' rows on each device, see `SparseMoE`.

        Raises:
          ValueError: for an unknown `remat`.
        """
        _check_remat(remat)
        self.config = config
        self.dtype = jnp.dtype(dtype or param_dtype)
        self.remat = remat
        # The directory that the model was loaded from; `save_hf` copies the tokenizer from there.
        # It is part of the graph, by which `nnx.jit` knows models of two directories apart.
        self.source: str | None = None
        V, D = config.vocab_size, config.hidden_size
        init = normal(config.initializer_range)
        repeats = config.num_hidden_layers // len(config.group)
        options: dict[str, Any] = dict(param_dtype=param_dtype, moe_buffer_factor=moe_buffer_factor)

        @nnx.split_rngs(splits=repeats)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs):
            return _Group(config, rngs=rngs, **options)

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
          segment_ids: which document each token belongs to. Each document of a row is a contiguous
            run of an id of its own; 0 is padding. None: each row is one document.
          positions: positions for the rotary embedding; None: they restart in each document.

        Returns:
          Logits, float32.

        Raises:
          ValueError: an argument is not of shape [B, T].
        """
        return self.logits(self.hidden_states(tokens, segment_ids, positions)[0])

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Embeds tokens, in the model's compute dtype."""
        return embed(tokens, self.embed_tokens[...], dtype=self.dtype)

    def head(self) -> Float[Array, "D V"]:
        """The output head; with tied embeddings, the transposed input embedding."""
        return self.embed_tokens[...].T if self.lm_head is None else self.lm_head[...]

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Applies the head to final hidden states; float32."""
        head = self.head().astype(hidden.dtype)
        if platform() == "cpu":
            # XLA:CPU would fuse the end of the last layer into this product and recompute it for
            # each tile of the vocabulary. An optimization barrier does not help: XLA:CPU drops it
            # before it fuses. It must keep this select, because the entry might be NaN.
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
          tokens, segment_ids, positions: as in `__call__`.
          observed: dict to which the layers' statistics are added, each stacked over the layers
            that have it; None: statistics are not computed.

        Returns:
          Hidden states after the final norm; router statistics of the L layers with experts, with
          fields [L, B, ...], or None if no layer has experts.

        Raises:
          ValueError: tokens, segment_ids or positions are not of shape [B, T], or `remat` was set
            to something unknown.
        """
        _check_remat(self.remat)
        check_shape("tokens", tokens, "B", "T")
        check_rows(tokens.shape, tokens=tokens, segment_ids=segment_ids, positions=positions)
        if positions is None:
            positions = default_positions(tokens.shape, segment_ids)

        run = functools.partial(
            self._run_group,
            segment_ids=segment_ids,
            positions=positions,
            observing=observed is not None,
        )
        x = self.embed(tokens)
        if self.is_unstacked:
            each = []
            for group in self.groups:
                graphs, params = self._alike(group)
                x, of_group = run(graphs, x, params)
                each.append(of_group)
            by_group = jax.tree.map(lambda *s: jnp.stack(s), *each)
        else:
            graphs, params = self._alike(self.groups)
            # On a CPU, a loop copies each group's residuals into the stacked array of all groups'.
            unroll = _MOST_UNROLLED if platform() == "cpu" else 1
            x, by_group = jax.lax.scan(functools.partial(run, graphs), x, params, unroll=unroll)
        # [groups, layers of a group that have it, ...] → [layers that have it, ...]
        seen = jax.tree.map(lambda s: s.reshape(-1, *s.shape[2:]), by_group)
        stats = seen.pop("router", None)
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

        The layers are unrolled: a scan would copy every parameter and every cached key at each
        token.

        Args:
          tokens: in [0, vocab_size).
          segment_ids: 1 for tokens, 0 for padding after them.
          positions: the next T positions of each row's sequence; the cache must have slots for all
            of them, padding included.
          cache: the layers' caches, from `empty_cache` or the last call.
          draft: whether some of the tokens may be rejected; then pass the next cache to
            `accept` of `model/cache.py` with the number of tokens accepted.

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
        for group in self.groups if self.is_unstacked else _split_groups(self.groups):
            yield from group.layers

    @property
    def is_unstacked(self) -> bool:
        """Whether this is an `unstacked` copy."""
        return isinstance(self.groups, nnx.List)

    def unstacked(self) -> "Qwen3Next":
        """A copy with each group's parameters in arrays of their own, to apply it many times.

        Reading a layer from stacked arrays copies it at each call, which this saves. In return
        every layer is compiled, where a stacked model compiles one group and loops over the groups.
        `load_checkpoint` can load a checkpoint in this form, which takes the memory of one copy
        only. Such a model cannot be saved.
        """
        graph, params = nnx.split(self)
        model = nnx.merge(graph, params)
        model.groups = nnx.List(_split_groups(self.groups))
        return model

    def _alike(self, group):
        """A group's layers as runs of equal neighbours: their graph definitions, and their states.

        Equal by graph definition, so that a layer whose module a user has replaced stands apart.
        """
        alike = [list(same) for _, same in itertools.groupby(group.layers, nnx.graphdef)]
        graphs = [nnx.graphdef(layers[0]) for layers in alike]
        params: list[Any] = [[nnx.state(layer) for layer in layers] for layers in alike]
        if self.remat != "none":
            # `_run_alike` scans over the layers. If it stacked their parameters, inside the
            # scan over groups, the stacked copies would be saved for the backward pass as well.
            layers_axis = 0 if self.is_unstacked else 1
            params = [
                jax.tree.map(lambda *p: jnp.stack(p, layers_axis), *of_layers)
                for of_layers in params
            ]
        return graphs, params

    def _run_group(self, graphs, x, params, **options):
        """Runs a group's layers.

        Args:
          graphs, params: what `_alike` returns.
          x: the group's input.
          options: segment_ids, positions and observing, for `_run_alike`.

        Returns:
          The group's output; and its layers' statistics as `_run_alike` returns them.
        """
        parts = []
        for graph, layers in zip(graphs, params, strict=True):
            x, seen = self._run_alike(graph, layers, x, **options)
            parts.append(seen)
        return x, concatenate_layers(parts)

    def _run_alike(self, graph, params, x, *, segment_ids, positions, observing):
        """Runs neighbouring layers that have the same graph definition.

        Args:
          graph: graph definition of each layer.
          params: list of the layers' states; with rematerialisation, one stacked state.
          x, segment_ids, positions: the layers' inputs.
          observing: whether to collect statistics.

        Returns:
          The last layer's output; and the layers' statistics, each stacked: with experts the
          router's, as "router", and if `observing` the observed ones.
        """

        def run(x, params):
            layer = nnx.merge(graph, params)
            seen: Observed | None = {} if observing else None
            x, stats, _ = layer(x, segment_ids=segment_ids, positions=positions, observed=seen)
            return x, (seen or {}) | ({} if stats is None else {"router": stats})

        if self.remat == "none":
            by_layer = []
            for layer_params in params:
                x, of_layer = run(x, layer_params)
                by_layer.append(of_layer)
            return x, jax.tree.map(lambda *s: jnp.stack(s), *by_layer)
        # The scan compiles one layer for all of them. `checkpoint` inserts optimization barriers,
        # which delay a layer's recomputation until the backward pass reaches it; without them the
        # TPU compiler's scheduler recomputes a whole group before it uses any of it.
        kept = (KEPT,) if self.remat == "layer_but_attention" else ()
        policy = jax.checkpoint_policies.save_only_these_names(*kept)
        return jax.lax.scan(jax.checkpoint(run, policy=policy), x, params)


def _check_remat(remat: str) -> None:
    if remat not in REMAT:
        raise ValueError(f"{remat=} is unknown; expected one of {', '.join(REMAT)}")


def _split_groups(stacked: _Group) -> list[_Group]:
    """Each group with parameters of its own, sliced from the stacked ones."""
    graph, params = nnx.split(stacked)
    repeats = jax.tree.leaves(params)[0].shape[0]
    return [nnx.merge(graph, jax.tree.map(lambda p, i=i: p[i], params)) for i in range(repeats)]
