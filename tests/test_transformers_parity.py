"""Logits and gradients against transformers' own models, weight by weight."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from oracles import SMALL, abstract_model, quick_jit, relative_error
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.models.qwen3_next import modeling_qwen3_next as theirs

from qwen3next_jax.checkpoint.hugging_face import dump_tensors, load_tensors
from qwen3next_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Case:
    """A shape, a batch, and a seed with which no router is near a tie."""

    batch: int
    length: int
    changes: dict
    seed: int = 0


# Lengths around the chunk of 64, key : value heads of 1, 1/2 and 1/4, every way to place layers.
CASES = {
    "released pattern": Case(
        2, 75, dict(num_hidden_layers=4, full_attention_interval=4, linear_num_value_heads=2)
    ),
    "one token, attention first": Case(
        3, 1, dict(layer_types=["full_attention", "linear_attention"], full_attention_interval=None)
    ),
    "length 63, weights not normalised": Case(
        2, 63, dict(norm_topk_prob=False, linear_num_value_heads=8, linear_conv_kernel_dim=3)
    ),
    "length 130, a dense layer": Case(
        1, 130, dict(mlp_only_layers=[1], intermediate_size=40, num_key_value_heads=1)
    ),
    "length 65, every other layer dense, tied": Case(
        2, 65,
        dict(num_hidden_layers=4, decoder_sparse_step=2, intermediate_size=40,
             tie_word_embeddings=True, num_key_value_heads=4, partial_rotary_factor=0.5),
    ),
    "interval 3, one expert a token": Case(
        2, 33,
        dict(num_hidden_layers=3, full_attention_interval=3, num_experts=11, num_experts_per_tok=1,
             linear_key_head_dim=12, linear_value_head_dim=8, norm_topk_prob=False),
    ),
}  # fmt: skip
DENSE = Case(
    2, 75,
    dict(model_type="qwen3", vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
         num_key_value_heads=2, head_dim=12, intermediate_size=40, max_position_embeddings=512),
)  # fmt: skip


@functools.cache
def transformers_model(name):
    """The model with transformers' initial weights, and our config of the same."""
    case = CASES.get(name, DENSE)
    torch.manual_seed(case.seed)
    if name == "dense":
        config = Qwen3Config(**case.changes, initializer_range=0.05)
        model = Qwen3ForCausalLM(config)
    else:
        config = Qwen3NextConfig(**{**SMALL, **case.changes}, initializer_range=0.05)
        config._experts_implementation = "eager"
        model = Qwen3NextForCausalLM(config)
    return model.eval(), ModelConfig.from_hf(config.to_dict())


def tensors_of(model):
    """A model's parameters by name, each once."""
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


def redraw(model, seed):
    """Moves all that starts out alike or at 0: norm weights, A_log and dt_bias."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p += torch.empty_like(p).uniform_(-0.5, 0.5, generator=generator)
            elif name.endswith("A_log"):
                p.copy_(torch.empty_like(p).uniform_(0.01, 16, generator=generator).log())
            elif name.endswith("dt_bias"):
                p.uniform_(-3, 3, generator=generator)


@functools.cache
def our_gradients_and_logits(name):
    config = transformers_model(name)[1]
    graph = nnx.split(abstract_model(config))[0]

    def mean_cross_entropy(params, tokens, targets):
        logits = nnx.merge(graph, params)(tokens)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)
        return -chosen.mean(), logits

    return quick_jit(jax.grad(mean_cross_entropy, has_aux=True))


@pytest.mark.parametrize("weights", ["initial", "redrawn"])
@pytest.mark.parametrize("name", [*CASES, "dense"])
def test_logits_and_gradients_are_those_of_transformers(name, weights, monkeypatch):
    case = CASES.get(name, DENSE)
    model, config = transformers_model(name)
    if weights == "redrawn":
        redraw(model, case.seed)
    tokens, targets = np.random.default_rng(case.seed).integers(
        0, 61, (2, case.batch, case.length), dtype=np.int32
    )
    ours = abstract_model(config)
    load_tensors(ours, tensors_of(model))
    grads, logits = our_gradients_and_logits(name)(
        nnx.state(ours), jnp.asarray(tokens), jnp.asarray(targets)
    )
    grads = dump_tensors(grads, config, fused_experts=True)

    asked = {"use_cache": False} | ({} if name == "dense" else {"output_router_logits": True})
    with torch.no_grad():
        out = model(torch.tensor(tokens).long(), **asked)
    A = config.num_experts_per_tok
    for router in out.get("router_logits", ()):
        best = router.softmax(-1).sort(descending=True).values
        gap = (best[:, A - 1] - best[:, A]).min()
        assert gap > 3e-6, "this seed brings a router within rounding of a tie; choose another"
    # Two float32 computations in another order; the logits are of size 1.
    np.testing.assert_allclose(logits, out.logits, atol=1e-4, rtol=0)

    # transformers' chunked form takes differences of running sums of decays. Where decays are
    # strong, its gradients of A_log and dt_bias are wrong in their first digit (measured against
    # float64); those of its token-by-token form are not.
    monkeypatch.setattr(
        theirs, "torch_chunk_gated_delta_rule", theirs.torch_recurrent_gated_delta_rule
    )
    out = model(torch.tensor(tokens).long(), use_cache=False)
    torch.nn.functional.cross_entropy(
        out.logits.flatten(0, 1), torch.tensor(targets).long().flatten()
    ).backward()
    expected = {name: p.grad.numpy().copy() for name, p in model.named_parameters()}
    model.zero_grad()
    assert grads.keys() == expected.keys()
    # Float32 noise of sums over tokens is a few 1e-6. What is zero on paper, such as the keys'
    # gradients where there is one key, is rounding on both sides: at least 1e-7 of the whole
    # gradient is allowed.
    whole = np.sqrt(sum((g**2).sum() for g in expected.values()))
    errors = {name: relative_error(grads[name], g, 1e-4 * whole) for name, g in expected.items()}
    print(np.abs(logits-out.logits.detach().numpy()).max(), sorted(errors.items(), key=lambda x: -x[1])[:5])
    assert not {name: e for name, e in errors.items() if e > 1e-3}
