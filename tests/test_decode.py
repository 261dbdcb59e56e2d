"""Generated tokens are those of the full forward pass, whatever shares the batch."""

import types

import jax.numpy as jnp
import numpy as np
import pytest
from launched import run_python
from oracles import quick_jit, random_model, small_config

from qwen3next_jax.inference import decode
from qwen3next_jax.inference.decode import Generation, check_prompts, generate
from qwen3next_jax.inference.sampling import require_integers

PROMPTS = [[5, 9, 2], [7], [3, 3, 8, 1, 30, 12, 4] * 6]


@pytest.fixture(scope="module")
def model():
    return random_model(small_config(), scale=0.3)


@pytest.mark.parametrize("piece", [16, 512])
def test_greedy_tokens_are_the_full_forward_pass_s_likeliest(model, piece, monkeypatch):
    monkeypatch.setattr(decode, "_PREFILL", piece)  # the long prompt is read in three, or at once
    new = generate(model, PROMPTS, max_new_tokens=20)
    forward = quick_jit(lambda tokens: model(tokens))
    for prompt, continuation in zip(PROMPTS, new, strict=True):
        assert len(continuation) == 20
        # All positions in one pass, padded to one length: what follows does not matter.
        tokens = prompt + continuation
        logits = forward(jnp.array([tokens + [0] * (62 - len(tokens))]))[0]
        for t, token in enumerate(continuation):
            scores = np.asarray(logits[len(prompt) + t - 1])
            # Two float32 computations may disagree on a near tie only.
            assert scores.max() - scores[token] <= 1e-4


def test_a_stop_token_ends_its_row_alone_and_is_not_returned(model):
    free = generate(model, PROMPTS, max_new_tokens=6)
    stop = free[0][2]
    stopped = generate(model, PROMPTS, max_new_tokens=6, stop_tokens=(stop,))
    for row, whole in zip(stopped, free, strict=True):
        assert row == (whole[: whole.index(stop)] if stop in whole else whole)


def test_tokens_come_in_parts_and_a_row_can_be_ended(model):
    whole = generate(model, PROMPTS, max_new_tokens=100)
    generation, new = Generation(model, PROMPTS, max_new_tokens=100), [[], [], []]
    looks = 0
    for tokens in generation:
        looks += 1
        for row, more in zip(new, tokens, strict=True):
            row += more
        if len(new[1]) >= 3:
            generation.stop(1)
    assert looks > 3
    assert new[0] == whole[0]
    assert new[2] == whole[2]
    assert 3 <= len(new[1]) < 100
    assert new[1] == whole[1][: len(new[1])]
    assert generation.passes == 99  # reading the prompts gave the first token


def test_a_generation_starts_at_the_pace_that_the_last_one_found(model, monkeypatch):
    seconds, now = 0.0, 0.0

    def monotonic():  # a call of the compiled passes lies between two looks at the clock
        nonlocal now
        now += seconds
        return now

    def parts():
        generation = Generation(model, PROMPTS, max_new_tokens=40, speculative=False)
        return [len(rows[0]) for rows in generation]

    monkeypatch.setattr(decode, "time", types.SimpleNamespace(monotonic=monotonic))
    decode._pace.cache_clear()
    seconds = 0.001
    assert parts() == [1, 1, 32, 6]
    assert parts() == [1, 32, 7]
    assert parts() == [1, 32, 7]
    seconds = 1 / 32  # by the seven at the end only 22 passes would fit, by the 32 as many
    assert parts() == [1, 32, 7]
    assert parts() == [1, 32, 7]
    seconds = 10.0
    assert parts() == [1, 32, *[1] * 7]
    assert parts() == [1] * 40


def test_the_same_seed_gives_the_same_text_and_another_one_another(model):
    first, again, other = (
        generate(model, PROMPTS, max_new_tokens=6, temperature=1.0, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again != other


def test_a_repetition_penalty_counts_the_prompt_and_what_was_generated(model):
    new = generate(model, PROMPTS, max_new_tokens=20, repetition_penalty=1e6)
    for prompt, continuation in zip(PROMPTS, new, strict=True):
        assert len(set(continuation)) == 20
        assert not set(continuation) & set(prompt)


def test_no_prompts_and_no_new_tokens_give_nothing(model):
    assert generate(model, []) == []
    assert generate(model, PROMPTS, max_new_tokens=0) == [[], [], []]


def test_what_does_not_fit_is_refused(model):
    with pytest.raises(ValueError, match="Prompt 1 is empty; begin it with the tokenizer's BOS"):
        generate(model, [[1], []])
    with pytest.raises(ValueError, match="500 tokens and 20 new ones exceed the model's context"):
        generate(model, [[1] * 500], max_new_tokens=20)
    with pytest.raises(ValueError, match=r"tokens from 3 to 61; this model's lie in \[0, 61\)"):
        generate(model, [[3, 61]])
    with pytest.raises(ValueError, match=r"stop_tokens holds \[-1, 61\]; this model's tokens lie"):
        generate(model, [[3]], stop_tokens=(61, 3, -1))
    for seed in (-1, 2**32):  # which JAX would take for another
        with pytest.raises(ValueError, match=rf"seed={seed} must lie in \[0, 2\*\*32\)"):
            generate(model, [[3]], seed=seed)
    with pytest.raises(ValueError, match="max_new_tokens=-1 must"):
        generate(model, [[3]], max_new_tokens=-1)
    with pytest.raises(ValueError, match="top_k=0 must be an integer of at least 1"):
        generate(model, [[3]], top_k=0)
    with pytest.raises(ValueError, match=r"max_new_tokens=2\.5 must be an integer"):
        require_integers(max_new_tokens=2.5)


def test_a_prompt_and_its_new_tokens_may_fill_the_context(model):
    check_prompts(model.config, [[1] * 492], max_new_tokens=20)
    with pytest.raises(ValueError, match="Prompt 0 of 493 tokens and 20 new ones exceed the"):
        check_prompts(model.config, [[1] * 493], max_new_tokens=20)


@pytest.mark.parametrize("tokens", [1, "ab", [1.5, 2], [[1], [2]], {"a": 1}, np.ones(2), None])
def test_what_is_no_list_of_tokens_is_refused_as_such(tokens):
    # Not by `generate`, whose types are checked in tests.
    with pytest.raises(ValueError, match=r"Prompt 1 must be a list of tokens such as \[1, 2, 3\]"):
        decode._tokens("Prompt 1", tokens)


def test_lists_of_tokens_may_be_arrays_and_sets():
    assert decode._tokens("stop_tokens", np.array([3, 4])) == [3, 4]
    assert decode._tokens("stop_tokens", {5}) == [5]


ON_A_MESH = """
import jax
import jax.numpy as jnp
from flax import nnx
from oracles import random_model, small_config
from qwen3next_jax.config import MeshConfig
from qwen3next_jax.inference.decode import _placement, generate
from qwen3next_jax.parallel.mesh import make_mesh, parameter_shardings

model = random_model(small_config(mtp_steps=1), scale=0.3)
graph, params = nnx.split(model)
mesh = make_mesh(MeshConfig(data=2, fsdp=4))
split = nnx.merge(graph, jax.device_put(params, parameter_shardings(params, mesh)))
for prompts in ([[5, 9, 2], [7], [3, 3, 8]], [[i, 1] for i in range(8)]):
    for options in (dict(), dict(speculative=False), dict(temperature=0.8, top_p=0.9)):
        options["max_new_tokens"] = 8
        assert generate(split, prompts, **options) == generate(model, prompts, **options)

# Rows are split over the devices if they divide into equal parts; else each device has all.
for rows, own in ((8, 1), (16, 2), (3, 3)):
    placed = _placement(nnx.state(split), rows)(jnp.zeros((rows, 5)))
    assert {shard.data.shape for shard in placed.addressable_shards} == {(own, 5)}

# On a mesh with other axes the model runs as plain code.
mine = jax.make_mesh((8,), ("mine",), axis_types=(jax.sharding.AxisType.Auto,))
whole = jax.sharding.NamedSharding(mine, jax.sharding.PartitionSpec())
copied = nnx.merge(graph, jax.device_put(params, whole))
options = dict(max_new_tokens=8)
assert generate(copied, prompts, **options) == generate(model, prompts, **options)
"""


@pytest.mark.slow
def test_eight_devices_write_what_one_writes():
    run_python("-c", ON_A_MESH, devices=8, check=True, timeout=600)
