"""What a step does with gradients, whatever model they come from."""

import dataclasses
import fnmatch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles import quick_jit, random_module, relative_error
from small_run import small_config

from qwen3next_jax.parallel.mesh import make_mesh
from qwen3next_jax.parallel.names import named_leaves
from qwen3next_jax.training import step
from qwen3next_jax.training.loss import complete_batch, loss
from qwen3next_jax.training.optimizer import make_optimizer
from qwen3next_jax.training.program import abstract_model, make_program
from qwen3next_jax.training.step import make_gradients


@pytest.fixture
def make_step(monkeypatch):
    """Makes a step whose batch holds the gradients and the metrics; and its first state."""
    monkeypatch.setattr(
        step, "make_gradients", lambda graph, config: lambda params, batch: (batch[0], batch[1])
    )
    return first_step


def first_step(params=None, **changes):
    config = small_config("unread", **{"train__diagnostics": False, **changes})
    rng = np.random.default_rng(0)
    params = params or nnx.State(
        {name: jnp.float32(rng.normal(size=(64, 32))) for name in ("embed_tokens", "lm_head")}
    )
    optimizer, schedule = make_optimizer(config.optimizer, 10, params)
    take = step.make_train_step(nnx.graphdef(nnx.Module()), optimizer, schedule, config)
    return take, step.initial_state(params, optimizer, config)


@pytest.fixture
def train_step(make_step):
    return make_step()


def batch_of(state, loss=1.0, gradient=0.5, **metrics):
    grads = jax.tree.map(lambda p: jnp.full_like(p, gradient), state.params)
    return grads, {"loss": loss, **metrics}


@pytest.mark.parametrize("bad", [dict(loss=np.nan), dict(gradient=np.inf)])
def test_what_is_not_finite_changes_no_parameter_then_or_later(train_step, bad):
    take, before = train_step
    first, metrics = take(before, batch_of(before))
    assert not metrics["halted"]
    assert first.step == 1
    halted = first
    for batch in (batch_of(before, **bad), batch_of(before)):
        halted, metrics = take(halted, batch)
        assert metrics["halted"]
        assert halted.step == 1
        for name, p in first.params.items():
            assert np.any(p != before.params[name])
            np.testing.assert_array_equal(halted.params[name], p)


@pytest.mark.parametrize(("on_overflow", "halts"), [("error", True), ("drop", False)])
def test_a_token_without_place_halts_a_run_unless_such_are_to_be_dropped(
    make_step, on_overflow, halts
):
    take, before = make_step(mesh__on_overflow=on_overflow, mesh__moe_buffer_factor=2.0)
    whole, metrics = take(before, batch_of(before, dropped_assignments=0.0))
    assert (bool(metrics["halted"]), int(whole.step)) == (False, 1)
    after, metrics = take(before, batch_of(before, dropped_assignments=1.0))
    assert (bool(metrics["halted"]), int(after.step)) == (halts, 0 if halts else 1)
    for name, p in after.params.items():
        np.testing.assert_array_equal(p, (before if halts else whole).params[name])


def test_grad_norm_is_that_of_all_gradients_together(train_step):
    take, before = train_step
    _, metrics = take(before, batch_of(before, gradient=0.5))
    assert metrics["grad_norm"] == 0.5 * (2 * 64 * 32) ** 0.5  # of two tables


@pytest.mark.parametrize("zero_centered", [False, True])
def test_update_ratios_are_of_the_step_taken_and_of_norms_as_the_config_has_them(
    make_step, zero_centered
):
    params = nnx.State({"norm": {"weight": jnp.ones(8)}, "lm_head": jnp.full((4, 8), 0.1)})
    changes = dict(train__diagnostics=True, model__zero_centered_norm=zero_centered)
    take, before = make_step(params, **changes)
    after, metrics = take(before, batch_of(before))

    def ratio(old, new, shift=0):
        return np.linalg.norm(new - old) / np.linalg.norm(old + shift)

    old, new = (jax.device_get(state.params) for state in (before, after))
    norms = ratio(old["norm"]["weight"], new["norm"]["weight"], shift=int(zero_centered))
    head = ratio(old["lm_head"], new["lm_head"])
    # Of an update of 1e-3, float32 numbers of size 1 keep four digits.
    np.testing.assert_allclose(metrics["update_ratio/norms"], norms, rtol=1e-4)
    np.testing.assert_allclose(metrics["update_ratio/head"], head, rtol=1e-4)


def test_donated_state_is_updated_where_it_lies(train_step):
    take, state = train_step
    text = jax.jit(take, donate_argnums=0).lower(state, batch_of(state)).compile().as_text()
    # XLA copies what two kernels read if one of them overwrites it.
    assert not [line for line in text.splitlines() if "f32[64,32]" in line and " copy(" in line]


def accumulating(parts):
    """A step's gradients and metrics, with every term of the loss at a weight that shows."""
    return small_config(
        "nowhere",
        model__num_hidden_layers=1,
        model__layer_types=("full_attention",),
        model__router_aux_loss_coef=0.2,
        model__mtp_steps=1,
        train__global_batch_size=4,
        train__sequence_length=12,
        train__gradient_accumulation_steps=parts,
        train__mtp_loss_weight=0.5,
        train__router_z_loss_weight=0.3,
        train__balance_scope="sequence",
        train__diagnostics=False,
        train__loss_chunk=4,
    )


def rows_of_as_many_tokens():
    """And documents; but of one row, as of a chat, little is learnt."""
    tokens = np.random.default_rng(0).integers(0, 256, (4, 12), dtype=np.int32)
    segments = np.ones((4, 12), np.int32)
    segments[0, 6:] = segments[1, 3:] = segments[2, 8:] = segments[3, 5:] = 2
    batch = complete_batch(jnp.asarray(tokens), jnp.asarray(segments))
    return {**batch, "loss_weights": batch["loss_weights"].at[1, :9].set(0)}


def test_micro_batches_give_gradients_and_metrics_of_the_whole_batch_with_the_config_s_weights():
    # The router's means are over rows and tokens, of which each micro-batch has as many.
    graph, shapes = abstract_model(accumulating(1))
    params = nnx.state(random_module(nnx.merge(graph, shapes), scale=0.3))
    batch = rows_of_as_many_tokens()

    def whole(params):
        return loss(
            nnx.merge(graph, params), batch, mtp_weight=0.5, z_weight=0.3, balance_scope="sequence"
        )

    (value, want), want_grads = quick_jit(jax.value_and_grad(whole, has_aux=True))(params)
    grads, found = quick_jit(make_gradients(graph, accumulating(2)))(params, batch)
    for name, x in {**want, "loss": value}.items():
        if name != "assignments":
            np.testing.assert_allclose(found[name], x, rtol=1e-5, err_msg=name)
    # The loads are those of all micro-batches: the busiest of a layer's experts over the mean.
    loads = np.asarray(want["assignments"])
    busiest = (loads.max(-1) / loads.mean(-1)).max()
    np.testing.assert_allclose(found["expert_load_max"], busiest, rtol=1e-6)
    # Float32 sums in another order, measured by the whole gradient where a part is near zero.
    floor = 1e-3 * np.sqrt(sum((np.asarray(g) ** 2).sum() for g in jax.tree.leaves(want_grads)))
    errors = jax.tree.map(lambda a, b: relative_error(a, b, floor), grads, want_grads)
    assert max(jax.tree.leaves(errors)) < 1e-5


FROZEN = ("*/router", "*/down_proj", "mtp/*", "lm_head")


@pytest.mark.parametrize("parts", [1, 2])
def test_frozen_parameters_have_no_gradients_and_the_others_have_theirs(parts):
    config = accumulating(parts)
    graph, shapes = abstract_model(config)
    params = nnx.state(random_module(nnx.merge(graph, shapes), scale=0.3))
    frozen = dataclasses.replace(
        config, train=dataclasses.replace(config.train, frozen_parameters=FROZEN)
    )
    batch = rows_of_as_many_tokens()
    (want, values), (found, others) = (
        quick_jit(make_gradients(graph, c))(params, batch) for c in (config, frozen)
    )
    assert values.keys() == others.keys()
    want, found = (dict(named_leaves(x)) for x in (want, found))
    trained = {n for n in want if not any(fnmatch.fnmatch(n, glob) for glob in FROZEN)}
    assert 5 < len(trained) < len(want) - 5
    assert found.keys() == trained
    for name, x in found.items():
        # Without the others XLA groups some float32 sums in another way.
        assert relative_error(x, want[name]) < 1e-5, name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_steps_leave_frozen_parameters_as_they_are_and_the_norm_and_the_moments_without_them(
    monkeypatch, optimizer
):
    params = {name: jnp.ones((64, 32)) for name in ("embed_tokens", "lm_head")}
    params["mlp"] = {"up_proj": jnp.ones((32, 64)), "down_proj": jnp.ones((64, 32))}
    kept = {"embed_tokens": params["embed_tokens"], "mlp": {"up_proj": params["mlp"]["up_proj"]}}

    def gradients(graph, config):
        return lambda params, batch: (jax.tree.map(jnp.ones_like, batch), {"loss": 1.0})

    monkeypatch.setattr(step, "make_gradients", gradients)
    changes = dict(optimizer__name=optimizer, optimizer__weight_decay=0.5)
    take, before = first_step(nnx.State(kept), **changes)
    want, metrics = take(before, nnx.State(kept))
    freeze = dict(train__frozen_parameters=("lm_head", "*/down_proj"), train__diagnostics=True)
    take, before = first_step(nnx.State(params), **changes, **freeze)
    after, found = take(before, nnx.State(kept))

    assert found["grad_norm"] == metrics["grad_norm"]
    assert {n for n in found if "ratio" in n} == {
        "update_ratio/embedding",
        "update_ratio/other",  # not in a layer
    }
    moments = {name for name, x in named_leaves(after.opt_state) if x.ndim}
    assert moments == {name for name, x in named_leaves(want.opt_state) if x.ndim}
    assert not [name for name in moments if "lm_head" in name or "down_proj" in name]
    names = [name for name, _ in named_leaves(before.params)]
    assert [name for name, _ in named_leaves(after.params)] == names
    expected = dict(named_leaves(before.params)) | dict(named_leaves(want.params))
    for name, x in named_leaves(after.params):
        np.testing.assert_array_equal(x, expected[name], err_msg=name)
    assert (after.params["embed_tokens"] != 1).all()


@pytest.mark.parametrize(
    ("globs", "problem"),
    [
        (
            ("lm_head", "mpt/*"),
            r"frozen_parameters has \['mpt/\*'\], which match no parameter; .*fc",
        ),
        (
            ("mtp/*", "*"),
            r"frozen_parameters=\('mtp/\*', '\*'\) matches every parameter; leave some",
        ),
    ],
)
def test_a_run_that_would_freeze_everything_or_what_no_parameter_is_called_is_refused(
    globs, problem
):
    config = small_config("unread", train__frozen_parameters=globs)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with pytest.raises(ValueError, match=problem):
        make_program(config, mesh)


def test_frozen_parameters_lie_in_their_own_dtype_but_gates_rates_in_float32():
    config = small_config(
        "unread",
        train__frozen_parameters=("groups/*",),
        precision__frozen="bfloat16",
        precision__compute="bfloat16",
    )
    dtypes = {name: x.dtype for name, x in named_leaves(abstract_model(config)[1])}
    rates = {name for name in dtypes if name.endswith(("A_log", "dt_bias"))}
    assert rates
    for name, dtype in dtypes.items():
        frozen = name.startswith("groups/") and name not in rates
        assert dtype == (jnp.bfloat16 if frozen else jnp.float32), name


class Table(nnx.Module):
    """The smallest model, for a loss that stands in for the model's."""

    def __init__(self, dtype):
        self.embed_tokens = nnx.Param(jnp.ones((8, 4), dtype))


@pytest.mark.parametrize("parts", [1, 2])
def test_drops_of_micro_batches_add_up_to_a_share_of_all_assignments(parts, monkeypatch):
    def dropping(model, batch, *, earlier_assignments, **_):
        """Six of the micro-batch's 24 assignments."""
        own = jnp.full((2, 4), 3.0)
        so_far = own if earlier_assignments is None else earlier_assignments + own
        return jnp.zeros(()), {"dropped_assignments": jnp.asarray(6.0), "assignments": so_far}

    monkeypatch.setattr(step, "loss", dropping)
    graph, params = nnx.split(Table("float32"))
    _, found = make_gradients(graph, accumulating(parts))(params, rows_of_as_many_tokens())
    assert found["dropped_assignments"] == 6 * parts
    assert found["dropped_share"] == 0.25


def test_micro_batches_gradients_of_bfloat16_parameters_are_summed_in_float32(monkeypatch):
    def first_token_times_the_table(model, batch, **_):
        total = model.embed_tokens[...].astype(jnp.float32).sum() * batch["tokens"][0, 0]
        return total, {"assignments": jnp.ones((2, 4)), "dropped_assignments": jnp.zeros(())}

    monkeypatch.setattr(step, "loss", first_token_times_the_table)
    graph, params = nnx.split(Table("bfloat16"))
    batch = rows_of_as_many_tokens()
    batch["tokens"] = batch["tokens"].at[:2, 0].set(jnp.array([256, 1]))
    grads, _ = quick_jit(make_gradients(graph, accumulating(2)))(params, batch)
    np.testing.assert_array_equal(grads["embed_tokens"][...], 128.5)  # which bfloat16 has not
