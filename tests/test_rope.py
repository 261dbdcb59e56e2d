"""Rotary embedding against transformers', within and beyond the original context."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracles import RELEASED, SMALL, abstract_model, quick_jit, small_config
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.models.qwen3_next import modeling_qwen3_next as theirs

from qwen3next_jax.checkpoint.hugging_face import load_tensors
from qwen3next_jax.config import ModelConfig
from qwen3next_jax.model import rope
from qwen3next_jax.model.rope import apply_rope, describe_positions

SIZES = dict(head_dim=256, rope_theta=1e7, partial_rotary_factor=0.25)


def rotated_by_transformers(x, positions, **rope):
    given = {**SMALL, **SIZES, "max_position_embeddings": 262_144, **rope}
    config = Qwen3NextConfig(**given)
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


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_part_of_each_head_is_rotated_as_transformers_does(platform, monkeypatch):
    monkeypatch.setattr(rope, "platform", lambda: platform)
    x, positions = example(262_143)
    got = apply_rope(jnp.asarray(x), jnp.asarray(positions), small_config(**SIZES))
    # Far beyond what float32 knows of such angles: only the very same roundings agree.
    np.testing.assert_allclose(got, rotated_by_transformers(x, positions), atol=1e-4)
    np.testing.assert_array_equal(got[..., 64:], x[..., 64:])
    halves = apply_rope(jnp.asarray(x, jnp.bfloat16), jnp.asarray(positions), small_config(**SIZES))
    assert halves.dtype == jnp.bfloat16


@pytest.mark.parametrize("factor", [2.0, 4.0])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"beta_fast": 16, "beta_slow": 2},
        {"attention_factor": 1.5},
        {"beta_fast": 1, "beta_slow": 32},  # a ramp that falls
        {"beta_fast": 3.01, "beta_slow": 3},  # and one of a single pair
    ],
)
def test_yarn_rotates_as_transformers_does_beyond_the_original_length(factor, more):
    check_yarn(factor, more, SIZES)


def test_a_ramp_of_yarn_may_end_behind_the_last_pair():
    # With this base, the pair that would turn once is the 37th of 32.
    check_yarn(4.0, {}, {**SIZES, "rope_theta": 1e4})


def check_yarn(factor, more, sizes):
    x, positions = example(int(262_144 * factor) - 1)
    rope = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": 262_144,
        **more,
    }
    want = rotated_by_transformers(x, positions, **sizes, rope_scaling=rope)
    config = small_config(**sizes, rope_scaling=rope)
    got = apply_rope(jnp.asarray(x), jnp.asarray(positions), config)
    np.testing.assert_allclose(got, want, atol=1e-4)
    unscaled = apply_rope(jnp.asarray(x), jnp.asarray(positions), small_config(**sizes))
    assert np.abs(got - unscaled).max() > 0.1  # or the case would not tell


def cos_and_sin(config, positions):
    """What a pair (1, 0) becomes at each position: [T, rotary_dim / 2] each."""
    half = config.rotary_dim // 2
    x = jnp.zeros((1, len(positions), 1, config.head_dim)).at[..., :half].set(1)
    rotated = apply_rope(x, jnp.asarray(positions, jnp.int32)[None], config)[0, :, 0]
    return rotated[:, :half], rotated[:, half : 2 * half]


@pytest.mark.parametrize("way", ["eager", "compiled"])
@pytest.mark.parametrize("factor", [None, 2.0, 3.7, 4.0])
def test_angles_of_the_released_model_are_those_of_transformers_to_1010000(factor, way):
    scaling = None
    if factor is not None:
        scaling = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": 262_144,
        }
    given = {**RELEASED, "rope_scaling": scaling}
    positions = np.concatenate(
        [np.arange(0, 1_010_000, 997), np.arange(262_140, 262_150), [1_009_998, 1_009_999]]
    )
    config = ModelConfig.from_hf(given)
    function = cos_and_sin if way == "eager" else jax.jit(cos_and_sin, static_argnums=0)
    got = function(config, positions)
    rotary = theirs.Qwen3NextRotaryEmbedding(Qwen3NextConfig(**given))
    want = rotary(torch.zeros(()), torch.tensor(positions).long()[None])
    # The angles, up to 10⁶ radians, are the same float32 numbers, where one rounding more would
    # make 0.03 of difference; what is left is the two libraries' cosine of the same number.
    for ours, reference in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, reference[0, :, :32], atol=5e-7)


@pytest.mark.parametrize("factor", [2.0, 4.0])
def test_logits_with_yarn_are_those_of_transformers_beyond_the_original_length(factor):
    yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": 32}
    # Half a head rotated: with a quarter of these small ones YaRN would have two pairs to act on.
    shape = dict(max_position_embeddings=32, partial_rotary_factor=0.5, rope_theta=100.0)
    torch.manual_seed(0)
    given = Qwen3NextConfig(
        **{
            **SMALL,
            **shape,
            "rope_parameters": {**yarn, "rope_theta": 100.0, "partial_rotary_factor": 0.5},
        },
        initializer_range=0.1,
    )
    given._experts_implementation = "eager"
    reference = Qwen3NextForCausalLM(given).eval()
    tensors = {name: p.detach().numpy() for name, p in reference.named_parameters()}
    tokens = np.random.default_rng(0).integers(0, 61, (1, 100), dtype=np.int32)
    with torch.no_grad():
        want = reference(torch.tensor(tokens).long(), use_cache=False).logits.numpy()

    def logits(config):
        model = abstract_model(config)
        load_tensors(model, tensors)
        return np.asarray(quick_jit(lambda m, t: m(t))(model, jnp.asarray(tokens)))

    config = ModelConfig.from_hf(given.to_dict())
    assert config.rope_scaling["factor"] == factor
    # Two float32 computations in another order; the logits are of size 1.
    np.testing.assert_allclose(logits(config), want, atol=1e-4, rtol=0)
    unscaled = logits(ModelConfig.from_hf({**SMALL, **shape}))
    assert np.abs(unscaled - want)[:, 32:].max() > 1e-2  # or the case would not tell


def test_the_log_says_how_far_positions_reach_and_by_what():
    released = ModelConfig.from_hf(RELEASED)
    assert describe_positions(released) == "Positions to 262144, without YaRN"
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262_144}
    assert describe_positions(ModelConfig.from_hf({**RELEASED, "rope_scaling": yarn})) == (
        "Positions to 1048576: YaRN with factor 4 over the original 262144, queries and keys times "
        "1.1386"
    )


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
