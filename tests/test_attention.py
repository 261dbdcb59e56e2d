"""Attention against PyTorch's in float64: values, gradients, blocks, slots."""

import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracles import quick_jit, relative_error

from qwen3next_jax.ops.attention import attention, cached_attention, causal_pairs, init_carry
from qwen3next_jax.ops.pallas import attention_blocks

blocks = importlib.import_module("qwen3next_jax.ops.attention")  # not the function of that name
IMPLEMENTATIONS = ["reference", "chunked", "pallas"]


def float64_attention(q, k, v, segments=None):
    """softmax(q kᵀ / √H) v with an explicit mask, heads repeated; torch tensors."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    mask = torch.ones(q.shape[2], k.shape[2]).tril().bool()[None]
    if segments is not None:
        mask = mask & (segments[:, :, None] == segments[:, None, :])
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~mask[:, None], -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def make(T, *, B=2, N=4, K=2, H=8, P=8, seed=0):
    rng = np.random.default_rng(seed)
    return [
        rng.standard_normal((B, T, heads, size)).astype(np.float32)
        for heads, size in ((N, H), (K, H), (K, P))
    ]


@functools.cache
def with_gradients(implementation):
    def f(arrays, cotangent, segments):
        out, vjp = jax.vjp(
            lambda *a: attention(*a, segment_ids=segments, implementation=implementation), *arrays
        )
        return out, vjp(cotangent)

    return quick_jit(f)


# 1100 tokens are three blocks, the last one not full.
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("T", "heads"), [(1, (4, 1)), (37, (4, 4)), (1100, (4, 2))])
def test_values_and_gradients_are_those_of_float64(T, heads, implementation):
    N, K = heads
    arrays = make(T, N=N, K=K, P=12)
    cotangent = np.random.default_rng(1).standard_normal((2, T, N, 12)).astype(np.float32)
    tensors = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in arrays]
    want = float64_attention(*tensors)
    want.backward(torch.tensor(cotangent, dtype=torch.float64))
    out, grads = with_gradients(implementation)(
        [jnp.asarray(x) for x in arrays], jnp.asarray(cotangent), None
    )
    # Means of values of size 1 in float32; a key's gradient sums over up to 1100 queries.
    np.testing.assert_allclose(out, want.detach(), atol=2e-6)
    for got, tensor in zip(grads, tensors, strict=True):
        np.testing.assert_allclose(got, tensor.grad, atol=2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_documents_attend_within_themselves(implementation):
    T = 700  # two blocks; documents end inside of them, one spans both
    segments = np.zeros((2, T), np.int32)  # padding behind
    for row, lengths in enumerate([(300, 13, 350), (1, 620, 70)]):
        segments[row, : sum(lengths)] = np.repeat([3, 1, 2], lengths)
    arrays = make(T)
    cotangent = np.random.default_rng(1).standard_normal((2, T, 4, 8)).astype(np.float32)
    cotangent[segments == 0] = 0  # what padding attends to is nobody's business
    tensors = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in arrays]
    want = float64_attention(*tensors, torch.tensor(segments))
    want.backward(torch.tensor(cotangent, dtype=torch.float64))
    out, grads = with_gradients(implementation)(
        [jnp.asarray(x) for x in arrays], jnp.asarray(cotangent), jnp.asarray(segments)
    )
    # As above, of float32 means and sums over up to 620 queries.
    real = segments != 0
    np.testing.assert_allclose(out[real], want.detach()[torch.tensor(real)], atol=2e-6)
    for got, tensor in zip(grads, tensors, strict=True):
        np.testing.assert_allclose(got, tensor.grad, atol=2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scores_of_thousands_neither_overflow_nor_lose_the_largest(implementation):
    q, k, v = make(600)
    q *= 1e3
    want = float64_attention(*(torch.tensor(x, dtype=torch.float64) for x in (q, k, v)))
    out, grads = with_gradients(implementation)(
        [jnp.asarray(x) for x in (q, k, v)], jnp.ones((2, 600, 4, 8)), None
    )
    # Scores of size 1e4 are known to 1e-3, and so are the weights.
    np.testing.assert_allclose(out, want, atol=1e-2)
    assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_inputs_give_bfloat16_outputs_close_to_float64(implementation):
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in make(600)]
    tensors = [torch.tensor(np.asarray(x, np.float64)) for x in arrays]
    want = float64_attention(*tensors)
    out = attention(*arrays, implementation=implementation)
    assert out.dtype == jnp.bfloat16
    # Weights and outputs are rounded to 8 bits: 1/256 of values up to 3.
    np.testing.assert_allclose(np.asarray(out, np.float32), want, atol=2e-2)


def test_gradients_of_many_blocks_of_bfloat16_are_summed_in_float32(monkeypatch):
    monkeypatch.setattr(blocks, "_BLOCK", 4)  # 128 of them
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in make(512)]
    arrays[0] *= jnp.asarray(0.1, jnp.bfloat16)  # even weights: all queries add to a key's gradient
    noise = np.random.default_rng(1).standard_normal((2, 512, 4, 8))
    cotangent = jnp.asarray(1 + 0.1 * noise, jnp.bfloat16)

    def gradients(implementation, *given):
        *arrays, cotangent = given

        def f(*arrays):
            return attention(*arrays, implementation=implementation)

        return quick_jit(lambda arrays, d: jax.vjp(f, *arrays)[1](d))(arrays, cotangent)

    exact = gradients("reference", *(x.astype(jnp.float32) for x in (*arrays, cotangent)))
    for got, want in zip(gradients("chunked", *arrays, cotangent), exact, strict=True):
        # Outputs, weights and results are rounded to 8 bits, 2e-3 of each; sums are not.
        assert relative_error(got.astype(jnp.float32), want) < 4e-3


def test_the_product_of_outputs_and_their_gradients_is_summed_in_float32():
    out = jnp.array([256, 1], jnp.bfloat16).reshape(1, 1, 1, 1, 1, 2)
    assert blocks.out_dot(out, jnp.ones_like(out)).item() == 257  # which bfloat16 has not


@pytest.mark.parametrize("queries", [3, 40])  # all slots at once, and by blocks
def test_scores_with_a_cache_of_bfloat16_are_float32(queries):
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in make(200))
    q *= 8  # scores so large that rounding them would change the weights
    exact = (x.astype(jnp.float32) for x in (q, k, v))
    want = attention(*exact, implementation="reference")[:, -queries:]
    old = 200 - queries
    got = cached_attention(
        *(x[:, old:] for x in (q, k, v)),
        lengths=jnp.full(2, old),
        cached_k=k[:, :old].transpose(0, 2, 3, 1),
        cached_v=v[:, :old].swapaxes(1, 2),
    )
    # Weights and outputs are rounded to 8 bits, 2e-3 of each.
    assert relative_error(got.astype(jnp.float32), want) < 4e-3


@pytest.mark.parametrize("queries", [3, 40])
@pytest.mark.parametrize("slots", [45, 1300])
def test_queries_see_the_filled_slots_of_a_cache_and_new_tokens_up_to_their_own(queries, slots):
    q, k, v = (jnp.asarray(x) for x in make(slots, B=3))
    whole = attention(q, k, v)
    own = jnp.array([[0], [slots - queries], [1]]) + jnp.arange(queries)
    row = jnp.arange(3)[:, None]
    # What lies in slots that are not filled must not matter, whatever it is.
    lengths = own[:, 0]
    later = (jnp.arange(slots) >= lengths[:, None])[..., None, None]
    cached_k, cached_v = (jnp.where(later, 1e4, x) for x in (k, v))
    out = cached_attention(
        q[row, own],
        k[row, own],
        v[row, own],
        lengths=lengths,
        cached_k=cached_k.transpose(0, 2, 3, 1),
        cached_v=cached_v.swapaxes(1, 2),
    )
    np.testing.assert_allclose(out, whole[row, own], atol=2e-6)  # float32 sums, reordered


def test_a_cache_is_read_in_float32_where_double_precision_is_allowed():
    with jax.enable_x64(True):
        q = jnp.zeros((1, 64, 4, 16), jnp.float32)
        cached = jnp.zeros((1, 2, 16, 1024), jnp.float32)
        text = str(
            jax.make_jaxpr(
                lambda q, k, c, n: cached_attention(
                    q, k, k, cached_k=c, cached_v=c.swapaxes(2, 3), lengths=n
                )
            )(q, q[:, :, :2], cached, jnp.zeros(1, jnp.int32))
        )
    assert "while" in text
    assert not re.search(r"f64\[\d", text)  # numbers may be


def test_memory_of_layers_in_a_scan_grows_with_tokens_not_with_pairs_of_them():
    def temporary_bytes(T):
        q, k, v = (jax.ShapeDtypeStruct((1, T, heads, 8), jnp.float32) for heads in (2, 1, 1))

        def loss(q, k, v, segments):
            def layer(x, _):
                return attention(x, k, v, segment_ids=segments, implementation="chunked"), None

            return jax.lax.scan(layer, q, None, length=2)[0].sum()

        segments = jax.ShapeDtypeStruct((1, T), jnp.int32)
        compiled = jax.jit(jax.grad(loss)).lower(q, k, v, segments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # Twice the tokens, twice the bytes, but for what does not grow.
    assert temporary_bytes(8192) < 2.1 * temporary_bytes(4096)


@pytest.mark.parametrize("ids", ["packed", "any"])
def test_pairs_of_blocks_without_a_common_document_are_not_visited(ids):
    rng = np.random.default_rng(0)
    B, T, C = 2, 61, 8
    lengths = rng.integers(1, 25, (B, T))
    rows = np.stack([np.repeat(np.arange(T), row)[:T] for row in lengths]) + 1
    rows[:, 50:] = 0  # padding of the rows; that of the last block is -1
    if ids == "any":
        rows = rng.permutation(T + 1)[rows]
    segments = blocks.split_blocks(jnp.asarray(rows), C)
    i, j = causal_pairs(len(segments))
    sources, first, end = blocks._sources_by_query_block(segments, segments, (i, j))
    visited = [(i, int(sources[n])) for i in range(len(first)) for n in range(first[i], end[i])]

    same = np.asarray(segments)[:, None, :, :, None] == np.asarray(segments)[None, :, :, None]
    common = same.any((2, 3, 4))[i, j]
    assert not common.all()
    needed = list(zip(i[common], j[common], strict=True))
    if ids == "packed":
        assert visited == needed
    else:
        assert set(needed) <= set(visited) <= set(zip(i, j, strict=True))
        assert len(set(visited)) == len(visited)


def test_padding_of_a_block_is_no_document_even_where_ids_are_bytes():
    segments = blocks.split_blocks(jnp.full((1, 5), 255, jnp.uint8), 4)
    assert segments.tolist() == [[[255] * 4], [[255, -1, -1, -1]]]


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs a GPU")
@pytest.mark.parametrize("documents", [1, 5])
def test_cudnn_gives_what_the_reference_gives(documents):
    T = 1024
    *arrays, cotangent = (
        jnp.asarray(x, jnp.bfloat16) for x in (*make(T, H=256, P=256), make(T, H=256)[0])
    )
    segments = jnp.broadcast_to(jnp.arange(T) * documents // T, (2, T))

    def run(implementation, arrays):
        def f(*arrays):
            return attention(*arrays, segment_ids=segments, implementation=implementation)

        out, vjp = jax.vjp(f, *arrays)
        return out, *vjp(cotangent.astype(out.dtype))

    want = run("reference", [x.astype(jnp.float32) for x in arrays])
    for got, exact in zip(run("cudnn", arrays), want, strict=True):
        # Weights and results are rounded to 8 bits; the reference's products to TensorFloat-32.
        error = jnp.linalg.norm(got.astype(jnp.float32) - exact)
        assert error <= 1e-2 * jnp.linalg.norm(exact)


@pytest.mark.parametrize("documents", [None, 3])
def test_cudnn_is_asked_for_causal_attention_within_documents(documents, monkeypatch):
    by_jax = jax.nn.dot_product_attention

    def on_any_platform(*arrays, implementation, **given):
        assert implementation == "cudnn"
        return by_jax(*arrays, **given, implementation="xla")

    monkeypatch.setattr(blocks, "check_implementation", lambda *_: None)
    monkeypatch.setattr(jax.nn, "dot_product_attention", on_any_platform)
    arrays, segments = [jnp.asarray(x) for x in make(40)], None
    if documents is not None:
        segments = jnp.broadcast_to(jnp.arange(40) * documents // 40, (2, 40))
    got, want = (
        attention(*arrays, segment_ids=segments, implementation=i) for i in ("cudnn", "reference")
    )
    np.testing.assert_allclose(got, want, atol=2e-6)  # float32 means, in another order


def test_on_a_gpu_long_rows_and_those_of_odd_lengths_are_not_cudnn_s(monkeypatch):
    monkeypatch.setattr(blocks, "platform", lambda: "gpu")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(blocks, "is_hopper", lambda: True)
    taken = {
        tokens: blocks.default_implementation(tokens, 256, 256, jnp.dtype("bfloat16"))
        for tokens in (4096, 4097, 16_384, 16_386)
    }
    assert taken == {4096: "cudnn", 4097: "chunked", 16_384: "cudnn", 16_386: "chunked"}


def test_on_a_gpu_only_what_cudnn_takes_is_its(monkeypatch):
    monkeypatch.setattr(blocks, "platform", lambda: "gpu")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def taken(key, value, dtype="bfloat16"):
        return blocks.default_implementation(4096, key, value, jnp.dtype(dtype))

    for hopper, largest in ((True, 256), (False, 128)):
        monkeypatch.setattr(blocks, "is_hopper", lambda hopper=hopper: hopper)
        assert taken(largest, largest) == "cudnn"
        assert taken(largest + 8, largest + 8) == "chunked"
    assert taken(64, 128) == taken(60, 60) == taken(64, 64, "float32") == "chunked"


def test_what_cannot_be_done_is_refused():
    q, k, v = (jnp.asarray(x) for x in make(4))
    with pytest.raises(ValueError, match="'flash' is unknown; expected 'chunked', 'pallas'"):
        attention(q, k, v, implementation="flash")
    with pytest.raises(ValueError, match="3 query heads are not divisible by 2 KV heads"):
        attention(q[:, :, :3], k[:, :, :2], v[:, :, :2])
    with pytest.raises(ValueError, match="0 tokens hold no token"):
        attention(q[:, :0], k[:, :0], v[:, :0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_continue_from_any_state_and_leave_blocks_of_no_pair_as_they_are(dtype):
    Z, B, K, R, C, H, P = 3, 3, 2, 2, 16, 8, 24
    rng = np.random.default_rng(0)

    def normal(*shape, dtype=dtype):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    q, k, v = normal(Z, B, K, R, C, H), normal(Z, B, K, C, H), normal(Z, B, K, C, P)
    # The first row's documents differ from block to block but for the first and the last. In the
    # second row the middle block shares none with the others, though its id lies between theirs.
    ids = np.stack([*[np.repeat([[1], [2], [1]], C, 1)] * 2, np.full((Z, C), 7)], axis=1)
    ids[::2, 1, C // 2 :] = 3
    ids = jnp.asarray(ids)
    every = causal_pairs(Z)
    pairs = np.array([2, 0, 2]), np.array([1, 2, 0])  # none of query block 1, none in order

    def states(module):
        own = module.accumulate(init_carry(q, v), q, k, v, ids, ids, every, causal=True)
        return own, module.accumulate(own, q, k, v, ids, ids, pairs, causal=False)

    (own, both), got = states(blocks), states(attention_blocks)
    # Weights are rounded to the dtype; sums are float32, in another order.
    close = functools.partial(
        np.testing.assert_allclose, rtol=2e-6, atol={"float32": 3e-6, "bfloat16": 3e-2}[dtype]
    )
    jax.tree.map(close, got, (own, both))
    np.testing.assert_array_equal(got[1][0][1], got[0][0][1])

    out, lse = blocks.finalize(both, v.dtype)
    d_out, d_q = normal(*out.shape), normal(*q.shape, dtype="float32")

    delta = blocks.out_dot(out, d_out)

    def gradients(module):
        return module.accumulate_gradients(
            d_q, q, k, v, ids, ids, lse, delta, d_out, pairs, causal=False
        )

    got = gradients(attention_blocks)
    jax.tree.map(close, got, gradients(blocks))
    np.testing.assert_array_equal(got[0][1], d_q[1])
