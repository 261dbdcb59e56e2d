"""Text from a model: read the prompts at once, then one token at a time from the cache."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int, Key

from qwen3next_jax.model.decoder import Qwen3Next


def generate(
    model: Qwen3Next,
    prompts: list[list[int]],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float | None = None,
    stop_tokens: tuple[int, ...] = (),
    seed: int = 0,
) -> list[list[int]]:
    """Continues each prompt.

    Args:
      model: any of ours.
      prompts: token lists, of unequal lengths as they come, none empty.
      max_new_tokens: the most that is added to each.
      temperature: 0 takes the likeliest token, 1 samples the model's distribution.
      top_p: sample from the likeliest tokens that together have this probability.
      stop_tokens: end a continuation; the stop token itself is not returned.
      seed: of the sampling.

    Returns:
      The new tokens of each prompt.

    Raises:
      ValueError: for an empty prompt, or one that leaves the model's context.
    """
    longest = max(map(len, prompts))
    slots = longest + max_new_tokens
    if min(map(len, prompts)) == 0:
        raise ValueError("A prompt is empty; begin it with the tokenizer's BOS token")
    if slots > model.config.max_position_embeddings:
        raise ValueError(
            f"A prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's "
            f"max_position_embeddings={model.config.max_position_embeddings}"
        )
    graph, params = nnx.split(model)
    lengths = jnp.array([len(p) for p in prompts])
    padded = jnp.array([p + [0] * (longest - len(p)) for p in prompts])
    cache = model.empty_cache(batch=len(prompts), slots=slots)
    index = jnp.broadcast_to(jnp.arange(longest), padded.shape)
    segments = (index < lengths[:, None]).astype(jnp.int32)
    logits, cache = _extend(graph, params, padded, segments, index, cache)
    logits = jnp.take_along_axis(logits, lengths[:, None, None] - 1, axis=1)[:, 0]

    keys = jax.random.split(jax.random.key(seed), max_new_tokens)
    new: list[list[int]] = [[] for _ in prompts]
    going = [True] * len(prompts)
    for t in range(max_new_tokens):
        tokens = _choose(logits, keys[t], temperature, top_p)
        for row, token in enumerate(tokens.tolist()):
            going[row] = going[row] and token not in stop_tokens
            if going[row]:
                new[row].append(token)
        if not any(going) or t + 1 == max_new_tokens:
            break
        positions = (lengths + t)[:, None]
        logits, cache = _extend(
            graph, params, tokens[:, None], jnp.ones_like(positions), positions, cache
        )
        logits = logits[:, 0]
    return new


@functools.partial(jax.jit, static_argnums=0, donate_argnums=5)
def _extend(graph, params, tokens, segments, positions, cache):
    model = nnx.merge(graph, params)
    hidden, _, cache = model.hidden_states(tokens, segments, positions, cache)
    return model.logits(hidden), cache


@functools.partial(jax.jit, static_argnums=(2, 3))
def _choose(
    logits: Array, key: Key[Array, ""], temperature: float, top_p: float | None
) -> Int[Array, "B"]:
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_p is not None:
        descending = jnp.sort(logits, axis=-1)[:, ::-1]
        probabilities = jax.nn.softmax(descending)
        # Kept while what is likelier has not yet reached top_p, so the likeliest always is.
        kept = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p
        least = jnp.where(kept, descending, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return jax.random.categorical(key, logits)
