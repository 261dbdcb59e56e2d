"""Text from a model: read the prompts in pieces, then a few tokens a pass, all from one cache.

The state of all sequences is one pytree that stays on the devices; its buffers are reused from pass
to pass. A pass runs the model over each sequence's newest token and the K tokens that were drafted
after it (K = 0 without speculation), keeps the drafts that are accepted, and drafts again. Several
passes run between two looks of the host, as many as fit into a tenth of a second.

A sequence's tokens depend on its prompt and the seed, not on how often the host looks. Rows of a
batch do not see each other, but they share the key of the random numbers: with sampling, the same
prompt in another batch gives another sample.
"""

import dataclasses
import functools
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
from qwen3next_jax.model.cache import empty_cache, keep
from qwen3next_jax.model.decoder import Qwen3Next
from qwen3next_jax.ops.platform import COMPILER_OPTIONS
from qwen3next_jax.parallel.mesh import ROWS, no_mesh
from qwen3next_jax.parallel.processes import exchange

DRAFTS = 2  # by default, where the model can draft
_PREFILL = 512  # tokens of each prompt read at a time
_SLOTS = 128  # caches grow by so many slots, so that similar requests share a compiled program
_PASSES = 32  # at most, between two looks of the host
_LOOK_EVERY = 0.1  # seconds


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
      model: any of ours, on any mesh.
      prompts: token lists, of unequal lengths as they come, none empty.
      max_new_tokens: the most that is added to each.
      temperature, top_k, top_p, min_p, repetition_penalty: see `Sampling`.
      stop_tokens: end a continuation; the stop token itself is not returned.
      seed: of the sampling.
      speculative: whether the MTP module drafts tokens, or how many; None: where the model has one.
        It changes how fast tokens come, not which: greedy ones stay the same but for near ties,
        sampled ones keep their distribution.

    Returns:
      The new tokens of each prompt.

    Raises:
      ValueError: for tokens or numbers that are no integers, an empty prompt, one that leaves the
        model's context, an unknown token, a seed or a sampling option out of range, or speculation
        without an MTP module.
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
    """Continues prompts step by step: each iteration gives each row's new tokens.

    Attributes:
      passes: how often the model was run over new tokens, reading the prompts aside.
      drafted, accepted: for each place in a draft, how many tokens were drafted there and how many
        were kept; empty without speculation.
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
          slots: at least so many tokens of room for each row: requests of unlike lengths that get
            the same share compiled programs.
          sampling: fields of `Sampling`.
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
        """Ends a row: it gets no more tokens."""
        self._ended.add(row)

    def __iter__(self) -> Iterator[list[list[int]]]:
        """Yields, until all rows have ended, a list of each row's new tokens, which may be none."""
        if not self._prompts or self._max_new_tokens == 0:
            return
        # A few rows, and a token at a time, do not divide over a mesh that the caller may have set.
        with no_mesh():
            structure, params = _for_decoding(self._model)
            state, tokens = self._read_prompts(structure, params)
        yield _rows(tokens, state.made)
        passes = 1
        while True:
            ended = np.isin(np.arange(len(self._prompts)), sorted(self._ended))
            state = state._replace(budget=jnp.where(ended, 0, state.budget))
            if not np.asarray(state.budget).any():
                return
            start = time.monotonic()
            with no_mesh():
                state, out, ran = _run(structure, self._rules, params, state, passes)
            new = _rows(out, state.made)
            self.passes += int(ran)
            self.drafted = np.asarray(state.drafted).tolist()
            self.accepted = np.asarray(state.accepted).tolist()
            # The first time it also compiled, and then one pass is the next guess as well.
            passes = int(passes * _LOOK_EVERY / (time.monotonic() - start))
            # Of several processes all take as many: passes are collectives.
            passes = exchange(min(max(passes, 1), _PASSES))[0]
            yield new

    def _read_prompts(self, structure, params):
        """Reads the prompts and draws each row's first token; gives the state and those tokens."""
        lengths = np.array([len(p) for p in self._prompts], np.int32)
        B, longest = len(lengths), int(lengths.max())
        pieces = _pieces(longest)
        needed = longest + self._max_new_tokens + self._rules.drafts + 1
        room = max(sum(pieces), needed, self._slots)
        model = structure.model(params)
        place = _placement(params, B)
        slots = -(-room // _SLOTS) * _SLOTS
        cache = model.empty_cache(batch=B, slots=slots)
        mtp_cache = None
        if self._rules.drafts:
            mtp_cache = empty_cache(model.config, FULL, batch=B, slots=slots, dtype=model.dtype)
        caches = place((cache, mtp_cache))
        last_hidden = place(jnp.zeros((B, model.config.hidden_size), model.dtype))
        length = place(jnp.asarray(lengths))

        padded = np.zeros((B, sum(pieces) + 1), np.int32)
        for row, prompt in zip(padded, self._prompts, strict=True):
            row[: len(prompt)] = prompt
        start = 0
        for width in pieces:
            # A row that has been read sits out, behind its last token.
            first = np.minimum(lengths, start)
            index = first[:, None] + np.arange(width + 1)
            tokens = place(jnp.asarray(np.take_along_axis(padded, index, axis=1)))
            first = place(jnp.asarray(first))
            caches, last_hidden = _prefill(
                structure, params, caches, last_hidden, tokens, first=first, length=length
            )
            start += width
        seen = None
        if self._rules.sampling.needs_seen:
            mask = np.zeros((B, model.config.vocab_size), bool)
            for row, prompt in zip(mask, self._prompts, strict=True):
                row[prompt] = True
            seen = place(jnp.asarray(mask))
        budget = place(jnp.full(B, self._max_new_tokens, jnp.int32))
        key = jax.random.key(self._seed)
        return _begin(
            structure, self._rules, params, caches, last_hidden,
            length=length, seen=seen, budget=budget, key=key,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Rules:
    """What a compiled program depends on."""

    sampling: Sampling
    drafts: int
    stop_tokens: tuple[int, ...]


class _State(NamedTuple):
    """All sequences, between two passes."""

    cache: Any
    mtp_cache: Any  # None without speculation
    length: Int[Array, "B"]  # tokens in the cache
    newest: Int[Array, "B"]  # the token behind them
    drafts: Int[Array, "B K"]  # and what may follow it,
    q: Float[Array, "B K V"]  # drawn from these
    seen: Bool[Array, "B V"] | None
    budget: Int[Array, "B"]  # tokens that may still be added; 0: the row has ended
    made: Int[Array, "B"]  # tokens added since the host last looked
    key: Key[Array, ""]
    drafted: Int[Array, "K"]
    accepted: Int[Array, "K"]


@functools.partial(
    jax.jit, static_argnums=0, donate_argnums=(2, 3), compiler_options=COMPILER_OPTIONS
)
def _prefill(structure, params, caches, last_hidden, tokens, *, first, length):
    """Reads a piece of each prompt, and keeps the hidden state of its last token.

    Args:
      structure, params: the model.
      caches: the model's, and that of its MTP module, None without speculation.
      last_hidden: [B, D], of the last tokens of those prompts that have been read to the end.
      tokens: [B, T + 1], the piece and the token after it.
      first: [B], the position of the piece's first token.
      length: [B], of the prompts.

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
        # The token behind a prompt's last one is not known yet; what is written there now will be
        # overwritten when it is.
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
    """Draws the first token of each row, from the hidden state of its prompt's last one."""
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
    state = _add(state, rules, tokens, jnp.zeros_like(length))
    state = _draft(model, rules, state, hidden, tokens, length[:, None] - 1, 0 * length)
    return state, tokens


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _run(structure, rules, params, state, passes):
    """Takes passes until all rows have ended, `passes` at most; see `_PASSES`."""
    model = structure.model(params)
    width = rules.drafts + 1
    B = len(state.length)

    def go_on(carry):
        i, state, _ = carry
        return (i < passes) & (state.budget > 0).any()

    def go(carry):
        i, state, out = carry
        made = state.made
        state, tokens = _pass(model, rules, state)
        # What lies beyond a row's new tokens is overwritten by its next ones.
        write = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))
        return i + 1, state, write(out, tokens, made)

    state = state._replace(made=jnp.zeros_like(state.made))
    out = jnp.zeros((B, _PASSES * width), jnp.int32)
    ran, state, out = jax.lax.while_loop(go_on, go, (0, state, out))
    return state, out, ran


def _pass(model, rules, state):
    """One pass of the model over the newest tokens and the drafts behind them."""
    K, B = rules.drafts, len(state.length)
    tokens = jnp.concatenate([state.newest[:, None], state.drafts], axis=1)
    positions = state.length[:, None] + jnp.arange(K + 1)
    going = state.budget > 0
    segments = jnp.broadcast_to(going[:, None], tokens.shape).astype(jnp.int32)
    hidden, cache = model.extend(tokens, segments, positions, state.cache, draft=K > 0)

    seen = state.seen
    if seen is not None:  # at each place, also the drafts before it
        drafted = jax.nn.one_hot(state.drafts, seen.shape[1], dtype=jnp.int32).cumsum(1) > 0
        seen = seen[:, None] | jnp.pad(drafted, ((0, 0), (1, 0), (0, 0)))
    p = rules.sampling.probabilities(model.logits(hidden), seen)
    key, verify_key = jax.random.split(state.key)
    tokens, kept = verify(state.drafts, state.q, p, sampling=rules.sampling, key=verify_key)

    if K:
        cache = keep(cache, jnp.where(going, kept + 1, 0))
    place = jnp.arange(K)
    state = state._replace(
        cache=cache,
        length=jnp.where(going, state.length + kept + 1, state.length),
        newest=tokens[jnp.arange(B), kept],
        key=key,
        drafted=state.drafted + going.sum(dtype=jnp.int32),
        accepted=state.accepted
        + (going[:, None] & (place < kept[:, None])).sum(0, dtype=jnp.int32),
    )
    state = _add(state, rules, tokens, kept)
    return _draft(model, rules, state, hidden, tokens, positions, kept), tokens


def _add(state, rules, tokens, kept):
    """Counts the new tokens [B, T], of which the first kept + 1 are real, and ends rows."""
    index = jnp.arange(tokens.shape[1])
    real = (index <= kept[:, None]) & (index < state.budget[:, None])
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


def _draft(model, rules, state, hidden, tokens, positions, kept):
    """Drafts behind the newest tokens, whose predecessors' hidden states are now known."""
    if not rules.drafts:
        return state
    key, draft_key = jax.random.split(state.key)
    drafts, q, mtp_cache = draft(
        model, hidden, tokens, positions, kept, state.mtp_cache,
        count=rules.drafts, sampling=rules.sampling, seen=state.seen, key=draft_key,
    )  # fmt: skip
    return state._replace(drafts=drafts, q=q, mtp_cache=mtp_cache, key=key)


class _Structure:
    """A model's graph definition, hashed once: it takes half a millisecond each time."""

    def __init__(self, graph: nnx.GraphDef):
        self.graph, self._hash = graph, hash(graph)

    def __hash__(self):
        return self._hash

    def __eq__(self, other):
        return isinstance(other, _Structure) and self.graph == other.graph

    def model(self, params: nnx.State) -> Qwen3Next:
        return nnx.merge(self.graph, params)


def _for_decoding(model: Qwen3Next) -> tuple[_Structure, nnx.State]:
    """The model in two parts, as the compiled programs take it."""
    graph, params = nnx.split(model)
    structure = _Structure(graph)
    return (structure, params) if model.is_unstacked else _unstacking(structure)(params)


@functools.lru_cache(maxsize=8)
def _unstacking(stacked: _Structure):
    """Takes the parameters of a model of this structure; gives the unstacked model in two parts."""
    structure = None

    @jax.jit
    def unstack(params):
        nonlocal structure  # known once this is traced
        graph, apart = nnx.split(stacked.model(params).unstacked())
        structure = _Structure(graph)
        return apart

    def both(params):
        apart = unstack(params)
        return structure, apart

    return both


def _pieces(longest: int) -> list[int]:
    """Widths in which prompts are read: few different ones, since each is compiled."""
    whole, rest = divmod(longest, _PREFILL)
    last = [max(16, 1 << (rest - 1).bit_length())] if rest else []
    return [_PREFILL] * whole + last


def _rows(tokens, counts) -> list[list[int]]:
    lists = np.asarray(tokens).tolist()
    return [row[:n] for row, n in zip(lists, np.asarray(counts).tolist(), strict=True)]


def _placement(params, batch: int):
    """How arrays with a batch axis in front are placed: with a mesh, split where they can be."""
    sharding = jax.tree.leaves(params)[0].sharding
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return lambda tree: tree
    ways = 1
    for axis in ROWS:
        ways *= sharding.mesh.shape[axis]
    # Each of several processes reads all rows.
    split = batch % ways == 0 and jax.process_count() == 1
    spec = PartitionSpec(ROWS) if split else PartitionSpec()
    return lambda tree: jax.device_put(tree, NamedSharding(sharding.mesh, spec))


def number_of_drafts(config: ModelConfig, speculative: bool | int | None) -> int:
    """How many tokens are drafted at a time; refuses, by a ValueError, what a model cannot do."""
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


def _tokens(name: str, given: Any) -> list[int]:
    """A list of integers; refuses all else."""
    try:
        tokens = np.asarray(given if hasattr(given, "shape") else list(given))
    except (TypeError, ValueError):
        tokens = np.empty(())
    if tokens.ndim != 1 or (tokens.size and not np.issubdtype(tokens.dtype, np.integer)):
        raise ValueError(f"{name} must be a list of tokens such as [1, 2, 3], got {given!r}")
    return [int(token) for token in tokens]


def check_prompts(
    config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    """Refuses, by a ValueError that names the first, prompts that a model cannot go on from."""
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
