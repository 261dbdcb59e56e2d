"""Rows split over devices give what they give on one: the mixers' ops, their gradients, their cost.

`split_ops.py` computes all of it in a process with 8 virtual devices, against the float64
recurrence (delta rule) and the implementations that see all tokens at once (the others).
"""

import json

import jax
import jax.numpy as jnp
import pytest
from launched import TESTS, run_python
from split_ops import MESHES, meshes

from qwen3next_jax.config import AXES
from qwen3next_jax.parallel import context
from qwen3next_jax.plan.search import abstract_mesh


@pytest.fixture(scope="module")
def report():
    done = run_python(TESTS / "split_ops.py", devices=8, capture_output=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("op", ["delta", "attention", "conv"])
def test_packed_documents_over_several_devices_give_what_they_give_on_one(op, mesh, report):
    check(report[f"{op} packed"][mesh])


@pytest.mark.parametrize("mesh", meshes(packed=True, implementation="pallas"))
@pytest.mark.parametrize("op", ["delta pallas", "delta reference", "attention pallas"])
def test_packed_documents_over_several_devices_suit_the_other_implementations(op, mesh, report):
    check(report[op][mesh])


@pytest.mark.parametrize("mesh", meshes(packed=False))
@pytest.mark.parametrize("op", ["delta", "attention", "conv"])
def test_without_segment_ids_a_row_is_one_document_on_all_devices(op, mesh, report):
    check(report[f"{op} whole"][mesh])


@pytest.mark.parametrize("module", ["GatedAttention", "GatedDeltaNet", "SparseMoE"])
def test_modules_over_several_devices_give_what_they_give_on_one(module, report):
    assert report["modules"][module] < 3e-6  # float32 sums in another order


@pytest.mark.parametrize("part", ["sum", "table", "head"])
def test_a_split_vocabulary_gives_the_loss_and_its_gradients_as_on_one(part, report):
    assert report["vocabulary"][part] < 3e-6


def check(errors):
    # Float32 against float64, or sums in another order; g's and strong decay's errors included.
    wrong = {
        (part, row): error
        for part, rows in errors.items()
        for row, error in rows.items()
        if not error < 3e-6
    }
    assert not wrong


@pytest.mark.parametrize("op", ["delta", "attention"])
def test_memory_of_a_device_falls_with_the_axis(op, report):
    used = report[f"{op} bytes"]
    # A quarter at best: what travels is small beside a stretch's states, but not beside its keys
    # and values. Eight ranks compose maps of states, which two do not: 3.75 for the delta rule.
    factor = {"delta": 3.7, "attention": 2.8}[op]
    assert used["1"] > used["2"] > factor * used["8"]


@pytest.mark.parametrize("op", ["delta", "attention"])
def test_nothing_but_neighbours_exchange_anything(op, report):
    found = report[f"{op} collectives"]
    assert set(found) == {"collective-permute"}
    # Of the row's 4096 tokens nothing larger than a device's 512 with their 4 heads of 32.
    assert found["collective-permute"][1] <= 512 * 4 * 32


def test_attention_whose_results_are_kept_goes_around_the_ring_once_less(report):
    # Keys, values and segment ids each on a first hop and on those in the loop.
    sends = report["attention sends"]
    assert sends["nothing"] - sends["attention"] == 3 + 3


def test_attention_deals_every_piece_once_and_early_ones_with_late_ones():
    for ways in (2, 3, 4, 8, 16):
        held = {rank: [] for rank in range(ways)}
        for half, pairs in enumerate(context._piece_moves(ways)):
            assert sorted(to for _, to in pairs) == list(range(ways))
            for source, to in pairs:
                held[to].append(2 * source + half)
        assert all(sorted(held[r]) == [r, 2 * ways - 1 - r] for r in range(ways))


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (
            36,
            dict(halves=True),
            "36 tokens cannot be split over mesh axis context=8.*multiple of 16",
        ),
        (36, {}, "choose a multiple of 8"),
        (16, dict(at_least=3), "choose a multiple of 8, at least 24"),
    ],
)
def test_tokens_that_cannot_be_split_are_refused_with_choices(tokens, options, message):
    with pytest.raises(ValueError, match=message):
        context._check_tokens(tokens, 8, **options)


def rows_of_attention(x):
    return context.attention(x, x, x)


def rows_of_delta_rule(x):
    return context.gated_delta_rule(x, x, x, log_decay=-x[..., 0], beta=x[..., 0])


def rows_of_conv(x):
    return context.causal_conv(x, jnp.ones((4, 4, 8)))


@pytest.mark.parametrize("op", [rows_of_attention, rows_of_delta_rule, rows_of_conv])
def test_rows_that_cannot_be_split_are_refused_with_choices(op):
    mesh = abstract_mesh(dict(data=2, fsdp=2, expert=1, context=1, tensor=1))
    with (
        jax.sharding.use_abstract_mesh(mesh),
        pytest.raises(ValueError, match="batch=3 is not divisible by the mesh's data=2 x fsdp=2"),
    ):
        op(jnp.ones((3, 64, 4, 8)))


@pytest.mark.parametrize(
    ("op", "shape", "axis", "message"),
    [
        (rows_of_conv, (1, 16, 4, 8), "context", "16 tokens .*multiple of 8, at least 24"),
        (rows_of_delta_rule, (1, 12, 4, 8), "context", "12 tokens .*choose a multiple of 8"),
        (rows_of_attention, (1, 24, 4, 8), "context", "24 tokens .*choose a multiple of 16"),
        (rows_of_attention, (1, 16, 6, 8), "tensor", "6 KV heads can neither be split nor repeat"),
    ],
)
def test_tokens_and_heads_that_an_op_cannot_split_are_refused(op, shape, axis, message):
    mesh = abstract_mesh({**dict.fromkeys(AXES, 1), axis: 8})
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(ValueError, match=message):
        op(jnp.ones(shape))


def test_implementations_of_attention_that_need_whole_rows_are_refused_where_they_are_split():
    x = jnp.ones((1, 64, 4, 8))

    def attend(ways):
        mesh = abstract_mesh(dict(data=1, fsdp=1, expert=1, context=ways, tensor=1))
        with jax.sharding.use_abstract_mesh(mesh):
            jax.eval_shape(lambda x: context.attention(x, x, x, implementation="reference"), x)

    attend(1)
    with pytest.raises(
        ValueError,
        match=r"'reference' needs whole rows, but .*context=2; use 'chunked' or 'pallas'",
    ):
        attend(2)
