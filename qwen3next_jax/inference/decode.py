"""Generation: prefill the prompts in pieces, then decode a few tokens a pass, with one cache.

The state of all sequences is one pytree that stays on the devices; its buffers are donated from
pass to pass. A pass runs the model over each sequence's newest token and the K tokens drafted after
it (K = 0 without speculation), verifies the drafts, and drafts again. Several passes run between
two host syncs, as many as fit into a tenth of a second by the time that earlier ones took.

A sequence's tokens depend on its prompt and the seed, not on the number of host syncs. Rows of a
batch do not attend to each other, but they share the PRNG key: with sampling, the same prompt in
another batch gives another sample.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from qwen3next_jax.config import FULL, ModelConfig
from qwen3next_jax.inference.sampling import Sampling, require_integers
from qwen3next_jax.inference.speculative import draft, verify
from qwen3next_jax.model.cache import accept, empty_cache
from qwen3next_jax.model.decoder import Qwen3Next
from qwen3next_jax.ops.platform import forward_program
from qwen3next_jax.parallel.mesh import ROWS, mesh_of, no_mesh
from qwen3next_jax.parallel.processes import exchange

DRAFTS = 2  # tokens drafted at a time by default, if the model has an MTP module
_PREFILL = 512  # tokens of each prompt in one prefill step
_SLOTS = 128  # caches are rounded up to multiples of this, so that requests share compiled programs
_MAX_PASSES = 32  # between two host syncs
_SYNC_SECONDS = 0.1  # aimed at between two host syncs


def generate(
    model: Qwen3Next,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop_tokens: Sequence[int] = (),
    seed: int = 0,
    speculative: bool | int | None = None,
) -> list[list[int]]:
    """Continues each prompt.

    Args:
      model: the model, on one device or a mesh.
      prompts: token lists, possibly of unequal lengths, none empty.
      max_new_tokens: most tokens to add to each prompt.
      temperature, top_k, top_p, min_p, repetition_penalty: fields of `Sampling`.
      stop_tokens: tokens that end a continuation; they are not returned.
      seed: PRNG seed for sampling, in [0, 2**32).
      speculative: whether the MTP module drafts tokens, or how many at a time; None: if the model
        has one. Speculation changes the speed, not the result: greedy tokens stay the same except
        at near ties, sampled ones keep their distribution.

    Returns:
      The new tokens of each prompt.

    Raises:
      ValueError: tokens, sizes or the seed are not integers; a prompt is empty, exceeds the model's
        context or has an unknown token; the seed or a sampling option is out of range; or
        speculation is asked of a model without an MTP module.
    """
    generation = Generation(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop_tokens=stop_tokens,
        seed=seed,
        speculative=speculative,
    )
    new: list[list[int]] = [[] for _ in prompts]
    for tokens in generation:
        for row, more in zip(new, tokens, strict=True):
            row += more
    return new


class Generation:
    """Continues prompts step by step: each iteration yields each row's new tokens.

    Attributes:
      passes: number of decoding passes so far; prefill is not counted.
      drafted, accepted: for each position in a draft, how many tokens were drafted and how many of
        them were accepted; empty without speculation.
    """

    def __init__(
        self,
        model: Qwen3Next,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 64,
        stop_tokens: Sequence[int] = (),
        seed: int = 0,
        speculative: bool | int | None = None,
        slots: int = 0,
        **sampling: Any,
    ):
        """Checks the request; nothing is computed before the first iteration.

        Args:
          model, prompts, max_new_tokens, stop_tokens, seed, speculative: as `generate` takes them.
          slots: least number of cache slots of a row. Requests of unlike lengths share compiled
            programs if they are allotted the same number.
          sampling: fields of `Sampling`.

        Raises:
          ValueError: as `generate`.
        """
        self._rules = _Rules(
            sampling=Sampling(**sampling),
            drafts=number_of_drafts(model.config, speculative),
            stop_tokens=tuple(sorted(set(_tokens("stop_tokens", stop_tokens)))),
        )
        self._prompts = [_tokens(f"Prompt {row}", prompt) for row, prompt in enumerate(prompts)]
        self._max_new_tokens, self._seed, self._slots = max_new_tokens, seed, slots
        require_integers(max_new_tokens=max_new_tokens, seed=seed)
        if not 0 <= seed < 2**32:
            raise ValueError(f"{seed=} must lie in [0, 2**32)")
        unknown = [i for i in self._rules.stop_tokens if not 0 <= i < model.config.vocab_size]
        if unknown:
            raise ValueError(
                f"stop_tokens holds {unknown}; this model's tokens lie in "
                f"[0, {model.config.vocab_size})"
            )
        check_prompts(model.config, self._prompts, max_new_tokens)
        self._model = model
        self._ended: set[int] = set()
        self.passes = 0
        self.drafted = [0] * self._rules.drafts
        self.accepted = [0] * self._rules.drafts

    def stop(self, row: int) -> None:
        """Ends a row: no more tokens are added to it."""
        self._ended.add(row)

    def __iter__(self) -> Iterator[list[list[int]]]:
        """Yields each row's new tokens, possibly none, until all rows have ended."""
        if not self._prompts or self._max_new_tokens == 0:
            return
        # A few rows of one token each cannot be sharded over a mesh that the caller may have set.
        with no_mesh():
            structure, params = _for_decoding(self._model)
            state, tokens = self._read_prompts(structure, params)
        yield _rows(tokens, state.made)
        pace = _pace(structure, self._rules, len(self._prompts))
        while True:
            ended = np.isin(np.arange(len(self._prompts)), sorted(self._ended))
            state = state._replace(budget=jnp.where(ended, 0, state.budget))
            if not np.asarray(state.budget).any():
                return
            # A pass has collectives, so all processes must run the same number of passes.
            max_passes = exchange(pace.max_passes)[0]
            start = time.monotonic()
            with no_mesh():
                state, out, passes_run = _run(structure, self._rules, params, state, max_passes)
            new, passes = _rows(out, state.made), int(passes_run)
            self.passes += passes
            self.drafted = np.asarray(state.drafted).tolist()
            self.accepted = np.asarray(state.accepted).tolist()
            if passes == max_passes:  # fewer, at the end, say little about the time of many
                # The first time this includes compilation, and one pass is tried again.
                fitting = int(passes * _SYNC_SECONDS / (time.monotonic() - start))
                pace.max_passes = min(max(fitting, 1), _MAX_PASSES)
            yield new

    def _read_prompts(self, structure, params):
        """Reads the prompts and draws each row's first token; returns the state and the tokens."""
        lengths = np.array([len(p) for p in self._prompts], np.int32)
        widths = _piece_widths(int(np.max(lengths)))
        model = structure.model(params)
        place = _placement(params, len(lengths))
        length = place(jnp.asarray(lengths))
        caches = place(self._empty_caches(model, widths))
        last_hidden = place(jnp.zeros((len(lengths), model.config.hidden_size), model.dtype))
        for tokens, first in _pieces(self._prompts, widths):
            caches, last_hidden = _prefill(model.dtype)(
                structure,
                params,
                caches,
                last_hidden,
                place(tokens),
                first=place(first),
                length=length,
            )
        seen = None
        if self._rules.sampling.needs_seen:
            mask = np.zeros((len(lengths), model.config.vocab_size), bool)
            for row, prompt in zip(mask, self._prompts, strict=True):
                row[prompt] = True
            seen = place(jnp.asarray(mask))
        return _begin(
            structure,
            self._rules,
            params,
            caches,
            last_hidden,
            length=length,
            seen=seen,
            budget=place(jnp.full(len(lengths), self._max_new_tokens, jnp.int32)),
            key=jax.random.key(self._seed),
        )

    def _empty_caches(self, model, widths):
        """The decoder's cache and its MTP module's, the latter None without speculation."""
        B, longest = len(self._prompts), max(map(len, self._prompts))
        needed = longest + self._max_new_tokens + self._rules.drafts + 1
        slots = -(-max(sum(widths), needed, self._slots) // _SLOTS) * _SLOTS
        mtp_cache = None
        if self._rules.drafts:
            mtp_cache = empty_cache(model.config, FULL, batch=B, slots=slots, dtype=model.dtype)
        return model.empty_cache(batch=B, slots=slots), mtp_cache


@dataclasses.dataclass(frozen=True)
class _Rules:
    """Static arguments of the compiled programs."""

    sampling: Sampling
    drafts: int
    stop_tokens: tuple[int, ...]


class _State(NamedTuple):
    """The state of all sequences between two passes."""

    cache: Any  # caches of the decoder's layers
    mtp_cache: Any  # cache of the MTP module; None without speculation
    length: Int[Array, "B"]  # number of tokens in the cache
    newest: Int[Array, "B"]  # last accepted token, not yet in the cache
    drafts: Int[Array, "B K"]  # proposed continuation of `newest`
    q: Float[Array, "B K V"]  # distributions that `drafts` were drawn from
    seen: Bool[Array, "B V"] | None  # tokens in the sequence; None without a repetition penalty
    budget: Int[Array, "B"]  # tokens that may still be added; 0: the row has ended
    made: Int[Array, "B"]  # tokens added since the last host sync
    key: Key[Array, ""]  # PRNG key, split at each use
    drafted: Int[Array, "K"]  # tokens drafted so far, by position in the draft
    accepted: Int[Array, "K"]  # tokens accepted so far, by position in the draft


@functools.partial(forward_program, static_argnums=0, donate_argnums=(2, 3))
def _prefill(structure, params, caches, last_hidden, tokens, *, first, length):
    """Reads a piece of each prompt, and keeps the hidden state of the prompt's last token.

    Args:
      structure, params: the model.
      caches: caches of the decoder and of its MTP module, the latter None without speculation.
      last_hidden: hidden states [B, D] of the last tokens of the prompts read to the end.
      tokens: the piece and the token after it, [B, T + 1].
      first: position [B] of the piece's first token.
      length: lengths [B] of the prompts.

    Returns:
      The next `caches` and `last_hidden`.
    """
    model = structure.model(params)
    cache, mtp_cache = caches
    tokens, following = tokens[:, :-1], tokens[:, 1:]
    positions = first[:, None] + jnp.arange(tokens.shape[1])
    real = positions < length[:, None]
    hidden, cache = model.extend(tokens, real.astype(jnp.int32), positions, cache)
    if mtp_cache is not None:
        # The token after a prompt's last one is not known yet: the cache entry written for it now
        # is overwritten once it is.
        _, _, mtp_cache = model.mtp(
            hidden, model.embed(following), positions=positions, cache=mtp_cache
        )
    is_last = positions == length[:, None] - 1
    last_hidden = jnp.where(
        is_last.any(1)[:, None],
        hidden[jnp.arange(len(hidden)), is_last.argmax(1)],
        last_hidden,
    )
    return (cache, mtp_cache), last_hidden


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _begin(structure, rules, params, caches, last_hidden, *, length, seen, budget, key):
    """Draws the first token of each row, from the hidden state of the prompt's last token."""
    model, K = structure.model(params), rules.drafts
    key, draw_key = jax.random.split(key)
    cache, mtp_cache = caches
    hidden = last_hidden[:, None]
    p = rules.sampling.probabilities(model.logits(hidden)[:, 0], seen)
    tokens = rules.sampling.draw(p, draw_key)[:, None]
    B, V = p.shape
    state = _State(
        cache=cache,
        mtp_cache=mtp_cache,
        length=length,
        newest=tokens[:, 0],
        drafts=jnp.zeros((B, K), jnp.int32),
        q=jnp.zeros((B, K, V)),
        seen=seen,
        budget=budget,
        made=jnp.zeros_like(budget),
        key=key,
        drafted=jnp.zeros(K, jnp.int32),
        accepted=jnp.zeros(K, jnp.int32),
    )
    state = _add(rules, state, tokens, jnp.zeros_like(length))
    none_accepted = jnp.zeros_like(length)
    state = _draft(model, rules, state, hidden, tokens, length[:, None] - 1, none_accepted)
    return state, tokens


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _run(structure, rules, params, state, max_passes):
    """Runs passes until all rows have ended, `max_passes` at most.

    Returns:
      The state, the new tokens [B, ...] of which each row's first `state.made` count, and the
      number of passes run.
    """
    model = structure.model(params)
    width = rules.drafts + 1
    B = len(state.length)

    def cond(carry):
        i, state, _ = carry
        return (i < max_passes) & (state.budget > 0).any()

    def body(carry):
        i, state, out = carry
        made = state.made
        state, tokens = _pass(model, rules, state)
        # The entries beyond a row's new tokens are overwritten by the row's next ones.
        write = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))
        return i + 1, state, write(out, tokens, made)

    state = state._replace(made=jnp.zeros_like(state.made))
    out = jnp.zeros((B, _MAX_PASSES * width), jnp.int32)
    passes_run, state, out = jax.lax.while_loop(cond, body, (0, state, out))
    return state, out, passes_run


def _pass(model, rules, state):
    """Runs the model over the newest tokens and their drafts; returns the state and new tokens."""
    K, B = rules.drafts, len(state.length)
    tokens = jnp.concatenate([state.newest[:, None], state.drafts], axis=1)
    positions = state.length[:, None] + jnp.arange(K + 1)
    active = state.budget > 0
    segments = jnp.broadcast_to(active[:, None], tokens.shape).astype(jnp.int32)
    hidden, cache = model.extend(tokens, segments, positions, state.cache, draft=K > 0)

    seen = state.seen
    if seen is not None:  # at each position, including the drafts before it
        drafted = jax.nn.one_hot(state.drafts, seen.shape[1], dtype=jnp.int32).cumsum(1) > 0
        seen = seen[:, None] | jnp.pad(drafted, ((0, 0), (1, 0), (0, 0)))
    p = rules.sampling.probabilities(model.logits(hidden), seen)
    key, verify_key = jax.random.split(state.key)
    tokens, count = verify(state.drafts, state.q, p, sampling=rules.sampling, key=verify_key)

    added = jnp.where(active, count + 1, 0)
    if K:
        cache = accept(cache, added)
    accepted = active[:, None] & (jnp.arange(K) < count[:, None])
    state = state._replace(
        cache=cache,
        length=state.length + added,
        newest=tokens[jnp.arange(B), count],
        key=key,
        drafted=state.drafted + active.sum(dtype=jnp.int32),
        accepted=state.accepted + accepted.sum(0, dtype=jnp.int32),
    )
    state = _add(rules, state, tokens, count)
    return _draft(model, rules, state, hidden, tokens, positions, count), tokens


def _add(rules, state, tokens, accepted):
    """Counts the new tokens [B, T], of which the first `accepted` + 1 are real, and ends rows."""
    index = jnp.arange(tokens.shape[1])
    real = (index <= accepted[:, None]) & (index < state.budget[:, None])
    stops = real & jnp.isin(tokens, jnp.array(rules.stop_tokens, jnp.int32))
    added = (real & (jnp.cumsum(stops, axis=1) == 0)).sum(1, dtype=jnp.int32)
    seen = state.seen
    if seen is not None:
        new = jax.nn.one_hot(tokens, seen.shape[1], dtype=bool) & real[..., None]
        seen = seen | new.any(1)
    return state._replace(
        seen=seen,
        budget=jnp.where(stops.any(1), 0, state.budget - added),
        made=state.made + added,
    )


def _draft(model, rules, state, hidden, tokens, positions, last):
    """Drafts a continuation of the newest tokens.

    Args:
      model, rules: the model and the static arguments.
      state: state after `_add`.
      hidden: hidden states [B, T, D] of the tokens before `tokens`.
      tokens: the new tokens [B, T].
      positions: positions [B, T] of the hidden states.
      last: index [B] in T of each row's newest token.
    """
    if not rules.drafts:
        return state
    key, draft_key = jax.random.split(state.key)
    drafts, q, mtp_cache = draft(
        model,
        hidden,
        tokens,
        positions,
        last,
        state.mtp_cache,
        count=rules.drafts,
        sampling=rules.sampling,
        seen=state.seen,
        key=draft_key,
    )
    return state._replace(drafts=drafts, q=q, mtp_cache=mtp_cache, key=key)


class _Structure:
    """A model's graph definition with its hash, which takes half a millisecond to compute."""

    def __init__(self, graph: nnx.GraphDef):
        self.graph, self._hash = graph, hash(graph)

    def __hash__(self):
        return self._hash

    def __eq__(self, other):
        return isinstance(other, _Structure) and self.graph == other.graph

    def model(self, params: nnx.State) -> Qwen3Next:
        return nnx.merge(self.graph, params)


@dataclasses.dataclass
class _Pace:
    """How many passes are run between two host syncs."""

    max_passes: int = 1


@functools.lru_cache(maxsize=64)
def _pace(structure: _Structure, rules: _Rules, batch: int) -> _Pace:
    """The pace that generations of this kind have found so far; the next one starts with it."""
    return _Pace()


def _for_decoding(model: Qwen3Next) -> tuple[_Structure, nnx.State]:
    """The model, unstacked, as the structure and parameters that the compiled programs take."""
    graph, params = nnx.split(model)
    structure = _Structure(graph)
    return (structure, params) if model.is_unstacked else _unstacking(structure)(params)


@functools.lru_cache(maxsize=8)
def _unstacking(stacked: _Structure):
    """A function from the parameters of a stacked model to structure and parameters, unstacked."""
    structure = None

    @jax.jit
    def unstack(params):
        nonlocal structure  # set when this is traced
        graph, unstacked = nnx.split(stacked.model(params).unstacked())
        structure = _Structure(graph)
        return unstacked

    def split(params):
        unstacked = unstack(params)
        return structure, unstacked

    return split


def _piece_widths(longest: int) -> list[int]:
    """Widths of the prefill steps; few different ones, since each is compiled."""
    whole, rest = divmod(longest, _PREFILL)
    last = [max(16, 1 << (rest - 1).bit_length())] if rest else []
    return [_PREFILL] * whole + last


def _pieces(prompts, widths):
    """Yields each prefill step's tokens [B, width + 1] and their first positions [B].

    The last token is that which follows the step's, for MTP.
    """
    lengths = np.array([len(p) for p in prompts], np.int32)
    padded = np.zeros((len(prompts), sum(widths) + 1), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    start = 0
    for width in widths:
        # A row that has been read starts after its last token, so that it has only padding.
        first = np.minimum(lengths, start)
        index = first[:, None] + np.arange(width + 1)
        tokens = np.take_along_axis(padded, index, axis=1)
        yield jnp.asarray(tokens), jnp.asarray(first)
        start += width


def _rows(tokens, counts) -> list[list[int]]:
    lists = np.asarray(tokens).tolist()
    return [row[:n] for row, n in zip(lists, np.asarray(counts).tolist(), strict=True)]


def _placement(params, batch: int):
    """A function that puts arrays with a leading batch axis on the mesh, sharded if possible."""
    mesh = mesh_of(params)
    if mesh is None:
        return lambda tree: tree
    ways = math.prod(mesh.shape[axis] for axis in ROWS)
    # With several processes rows are not sharded, since each process reads all of them.
    split = batch % ways == 0 and jax.process_count() == 1
    spec = PartitionSpec(ROWS) if split else PartitionSpec()
    return lambda tree: jax.device_put(tree, NamedSharding(mesh, spec))


def number_of_drafts(config: ModelConfig, speculative: bool | int | None) -> int:
    """How many tokens are drafted at a time.

    Args:
      config: the model's config.
      speculative: as in `generate`.

    Raises:
      ValueError: `speculative` is negative, or the model has no MTP module to draft with.
    """
    has_mtp = config.mtp_steps > 0
    if speculative is None or speculative is True:
        drafts = DRAFTS if has_mtp or speculative else 0
    else:
        require_integers(speculative=speculative)
        drafts = int(speculative)
    if drafts < 0:
        raise ValueError(f"{speculative=} must be a number of drafts, at least 0")
    if drafts and not has_mtp:
        raise ValueError(
            f"{speculative=} needs an MTP module, and this model has none (mtp_steps=0); give "
            "speculative=False"
        )
    return drafts


def _tokens(name: str, value: Any) -> list[int]:
    """The value as a list of integers; a ValueError if it is none."""
    try:
        tokens = np.asarray(value if hasattr(value, "shape") else list(value))
    except (TypeError, ValueError):
        tokens = np.empty(())
    if tokens.ndim != 1 or (tokens.size and not np.issubdtype(tokens.dtype, np.integer)):
        raise ValueError(f"{name} must be a list of tokens such as [1, 2, 3], got {value!r}")
    return [int(token) for token in tokens]


def check_prompts(
    config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    """Checks prompts before a model is loaded.

    Raises:
      ValueError: a prompt is empty, has an unknown token, or exceeds the context with its new
        tokens; or `max_new_tokens` is negative.
    """
    if max_new_tokens < 0:
        raise ValueError(f"{max_new_tokens=} must be at least 0")
    vocabulary, context = config.vocab_size, config.context_length
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"Prompt {row} is empty; begin it with the tokenizer's BOS token")
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise ValueError(
                f"Prompt {row} holds tokens from {min(prompt)} to {max(prompt)}; this model's lie "
                f"in [0, {vocabulary})"
            )
        if len(prompt) + max_new_tokens > context:
            raise ValueError(
                f"Prompt {row} of {len(prompt)} tokens and {max_new_tokens} new ones exceed the "
                f"model's context of {context}; shorten them, or extend it by rope_scaling (YaRN)"
            )
