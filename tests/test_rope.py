"""Rotary embedding against transformers', within and beyond the original context."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracles import SMALL, small_config
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next import modeling_qwen3_next as theirs

from qwen3next_jax.config import ModelConfig
from qwen3next_jax.model.rope import apply_rope

SIZES = dict(head_dim=256, rope_theta=1e7, partial_rotary_factor=0.25)


def rotated_by_transformers(x, positions, **rope):
    config = Qwen3NextConfig(**{**SMALL, **SIZES, "max_position_embeddings": 262_144}, **rope)
    cos, sin = theirs.Qwen3NextRotaryEmbedding(config)(
        torch.tensor(x), torch.tensor(positions).long()
    )
    x = torch.tensor(x)
    return theirs.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)[0].numpy()


def example(last):
    """Vectors at positions spread over 0..last, the last ones included."""
    rng = np.random.default_rng(0)
    positions = np.stack([np.linspace(0, last, 50), last - np.arange(50)]).astype(np.int32)
    return rng.standard_normal((2, 50, 3, 256), np.float32), positions


def test_a_part_of_each_head_is_rotated_as_transformers_does():
    x, positions = example(262_143)
    got = apply_rope(jnp.asarray(x), jnp.asarray(positions), small_config(**SIZES))
    # Far beyond what float32 knows of such angles: only the very same roundings agree.
    np.testing.assert_allclose(got, rotated_by_transformers(x, positions), atol=1e-4)
    np.testing.assert_array_equal(got[..., 64:], x[..., 64:])


@pytest.mark.parametrize("factor", [2.0, 4.0])
@pytest.mark.parametrize("more", [{}, {"beta_fast": 16, "beta_slow": 2}, {"attention_factor": 1.5}])
def test_yarn_rotates_as_transformers_does_beyond_the_original_length(factor, more):
    x, positions = example(int(262_144 * factor) - 1)
    rope = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": 262_144,
        **more,
    }
    want = rotated_by_transformers(x, positions, rope_scaling=rope)
    config = small_config(**SIZES, rope_scaling=rope)
    got = apply_rope(jnp.asarray(x), jnp.asarray(positions), config)
    np.testing.assert_allclose(got, want, atol=1e-4)
    unscaled = apply_rope(jnp.asarray(x), jnp.asarray(positions), small_config(**SIZES))
    assert np.abs(got - unscaled).max() > 0.1  # or the case would not tell


def test_products_depend_on_the_distance_alone():
    config = small_config(**SIZES)
    x, _ = example(0)
    q, k = jnp.asarray(x[:1]), jnp.asarray(x[1:])
    positions = jnp.arange(50)[None]

    def products(shift):
        a, b = (apply_rope(y, positions + shift, config) for y in (q, k))
        return jnp.einsum("btnh,bsnh->bnts", a, b)

    # Products are of size 16, and angles of some hundreds are known to 3e-5.
    np.testing.assert_allclose(products(0), products(300), atol=2e-3)


def test_both_dialects_of_the_config_rotate_alike():
    x, positions = example(4000)
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    released = small_config(**SIZES, rope_scaling=rope)
    given = {**SMALL, **SIZES}
    del given["rope_theta"], given["partial_rotary_factor"]
    parameters = {**rope, "rope_theta": 1e7, "partial_rotary_factor": 0.25}
    newer = ModelConfig.from_hf({**given, "rope_parameters": parameters})
    a, b = (apply_rope(jnp.asarray(x), jnp.asarray(positions), c) for c in (released, newer))
    np.testing.assert_array_equal(a, b)
