"""Documents packed in a row give what they give alone, whatever lies beside them.

The delta rule, the convolution and MTP labels are shown in their own files; here attention and the
whole model.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles import quick_jit, random_model, relative_error, segments_of, small_config

from qwen3next_jax.ops.attention import attention


@functools.cache
def attention_and_gradients(implementation):
    def f(arrays, cotangent, segments):
        out, vjp = jax.vjp(
            lambda *a: attention(*a, segment_ids=segments, implementation=implementation), *arrays
        )
        return out, vjp(cotangent)

    return quick_jit(f)


# Three blocks of 512: a document inside one, one over an edge, one over a whole block, padding.
LENGTHS = (40, 1, 500, 521)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_attention_inside_a_document_is_what_it_is_alone(implementation):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((1, 1100, n, 8)).astype(np.float32) for n in (4, 2, 2)]
    cotangent = rng.standard_normal((1, 1100, 4, 8)).astype(np.float32)
    segments = segments_of(*LENGTHS, total=1100)
    for document in range(1, len(LENGTHS) + 1):
        here = np.flatnonzero(segments[0] == document)
        # Neighbours a thousand times larger would show through any leak.
        loud = [np.where(segments[..., None, None] == document, x, 1e3 * x) for x in arrays]
        out, grads = attention_and_gradients(implementation)(
            [jnp.asarray(x) for x in loud], jnp.asarray(cotangent), jnp.asarray(segments)
        )
        alone, alone_grads = attention_and_gradients("reference")(
            [jnp.asarray(x[:, here]) for x in arrays], jnp.asarray(cotangent[:, here]), None
        )
        # Float32 sums over at most 521 tokens in another order.
        np.testing.assert_allclose(out[:, here], alone, atol=1e-5)
        for packed, single in zip(grads, alone_grads, strict=True):
            np.testing.assert_allclose(packed[:, here], single, atol=1e-5)


def test_a_document_gives_the_model_the_logits_and_gradients_it_gives_alone():
    model = random_model(small_config())
    graph, params = nnx.split(model)

    @quick_jit
    def gradients_and_logits(params, tokens, cotangent, segment_ids):
        def f(params):
            logits = nnx.merge(graph, params)(tokens, segment_ids)
            return (logits * cotangent).sum(), logits

        return jax.grad(f, has_aux=True)(params)

    # All three of a length, so that one compiled function takes each alone; the second one lies
    # over a chunk's edge of the delta rule.
    length, total = 37, 120
    rng = np.random.default_rng(0)
    segments = segments_of(length, length, length, total=total)
    cotangents = rng.standard_normal((1, total, 61)).astype(np.float32)
    rows = rng.integers(0, 61, (2, 1, total), dtype=np.int32)
    for document in (2, 3):
        here = np.flatnonzero(segments[0] == document)
        rows[1][:, here] = rows[0][:, here]
        alone_grads, alone = gradients_and_logits(
            params, jnp.asarray(rows[0][:, here]), jnp.asarray(cotangents[:, here]), None
        )
        cotangent = np.where(segments[..., None] == document, cotangents, 0)
        for row in rows:  # the same document between other neighbours
            grads, logits = gradients_and_logits(
                params, jnp.asarray(row), jnp.asarray(cotangent), jnp.asarray(segments)
            )
            # Logits of size 1 in float32; gradients' sums of float32 terms in another order.
            np.testing.assert_allclose(logits[:, here], alone, atol=1e-5)
            whole = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(alone_grads)))
            errors = jax.tree.map(
                lambda a, b, floor=1e-2 * whole: relative_error(a, b, floor), grads, alone_grads
            )
            assert max(jax.tree.leaves(errors)) < 1e-5
        rows[1] = rng.integers(0, 61, (1, total), dtype=np.int32)
