"""Text read in pieces, then token by token, against reading it at once."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles import quick_jit, random_model, relative_error, small_config

from qwen3next_jax.model.cache import next_tail

PROMPTS, LENGTH, PIECE = (23, 9, 16), 30, 8


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("changes", [{}, {"mlp_only_layers": [0, 1], "intermediate_size": 24}])
def test_prefill_in_pieces_then_steps_equals_the_full_forward_at_every_position(changes, apart):
    model = random_model(small_config(**changes))
    tokens = np.random.default_rng(0).integers(1, 61, (3, LENGTH), dtype=np.int32)
    got = in_pieces(model.unstacked() if apart else model, tokens)
    # Hidden states of size 1 through two float32 layers, the recurrence in another order.
    np.testing.assert_allclose(got, at_once(model, tokens), atol=1e-4)


def test_in_bfloat16_pieces_and_steps_are_as_close_to_float32_as_the_full_forward():
    model = random_model(small_config(), param_dtype=jnp.bfloat16)
    tokens = np.random.default_rng(0).integers(1, 61, (3, LENGTH), dtype=np.int32)
    got, full = in_pieces(model, tokens), at_once(model, tokens)
    model.dtype = jnp.dtype(jnp.float32)
    exact = at_once(model, tokens)
    assert relative_error(got, exact) < 1.5 * relative_error(full, exact)


def at_once(model, tokens):
    graph, params = nnx.split(model)
    full = quick_jit(lambda params, tokens: nnx.merge(graph, params).hidden_states(tokens)[0])
    return np.asarray(full(params, jnp.asarray(tokens)), np.float32)


def in_pieces(model, tokens):
    """Hidden states of all positions: the prompts in pieces of `PIECE`, then token by token."""
    graph, params = nnx.split(model)

    @quick_jit
    def extend(params, *args):
        return nnx.merge(graph, params).extend(*args)

    cache = model.empty_cache(batch=3, slots=LENGTH + PIECE)
    got = np.full((*tokens.shape, model.config.hidden_size), np.nan, np.float32)

    def add(first, count):
        """Rows b's tokens first[b] to first[b] + count[b], padded to a common width."""
        nonlocal cache
        width = PIECE if count.max() > 1 else 1
        index = first[:, None] + np.arange(width)
        real = np.arange(width) < count[:, None]
        padded = np.where(real, np.take_along_axis(tokens, index.clip(max=LENGTH - 1), 1), 7)
        hidden, cache = extend(
            params,
            jnp.asarray(padded),
            jnp.asarray(real.astype(np.int32)),
            jnp.asarray(index.astype(np.int32)),
            cache,
        )
        for b in range(3):
            got[b, first[b] : first[b] + count[b]] = hidden[b, : count[b]]

    prompts = np.array(PROMPTS)
    for start in range(0, max(PROMPTS), PIECE):  # short prompts sit out the last pieces
        first = np.minimum(start, prompts)
        add(first, np.minimum(prompts, start + PIECE) - first)
    for step in range(LENGTH - min(PROMPTS)):  # and long ones the last steps
        first = np.minimum(prompts + step, LENGTH)
        add(first, np.minimum(LENGTH - first, 1))
    return got


def test_the_tail_holds_the_last_inputs_of_each_row_without_padding():
    tail = jnp.array([[1.0, 2, 3], [4, 5, 6]])[..., None]
    x = jnp.array([[10.0, 11, 12, 13], [20, 0, 0, 0]])[..., None]
    new = next_tail(tail, x, jnp.array([4, 1]))
    np.testing.assert_array_equal(new[..., 0], [[11, 12, 13], [5, 6, 20]])
    np.testing.assert_array_equal(next_tail(tail, x, jnp.array([0, 0])), tail)
