"""What a step does with gradients, whatever model they come from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_run import small_config

from qwen3next_jax.training import step
from qwen3next_jax.training.optimizer import make_optimizer


@pytest.fixture
def train_step(monkeypatch):
    """A step whose batch holds the gradients and the loss; and its first state."""
    monkeypatch.setattr(
        step, "make_gradients", lambda graph, config: lambda params, batch: (batch[0], batch[1])
    )
    config = small_config("unread", train__diagnostics=False)
    rng = np.random.default_rng(0)
    params = nnx.State(
        {name: jnp.float32(rng.normal(size=(64, 32))) for name in ("embed_tokens", "lm_head")}
    )
    optimizer, _ = make_optimizer(config.optimizer, 10, params)
    take = step.make_train_step(nnx.graphdef(nnx.Module()), optimizer, config)
    return take, step.initial_state(params, optimizer)


def batch_of(state, loss=1.0, gradient=0.5):
    return jax.tree.map(lambda p: jnp.full_like(p, gradient), state.params), {"loss": loss}


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


def test_donated_state_is_updated_where_it_lies(train_step):
    take, state = train_step
    text = jax.jit(take, donate_argnums=0).lower(state, batch_of(state)).compile().as_text()
    # XLA copies what two kernels read if one of them overwrites it.
    assert not [line for line in text.splitlines() if "f32[64,32]" in line and " copy(" in line]
