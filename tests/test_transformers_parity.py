"""Logits and gradients against transformers' own models, weight by weight."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hf_tensors import dump_tensors
from oracles import DENSE, SMALL, abstract_model, quick_jit, random_model, relative_error
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.models.qwen3_next import modeling_qwen3_next as theirs

from qwen3next_jax.checkpoint.hugging_face import load_tensors
from qwen3next_jax.config import ModelConfig

torch.set_num_threads(1)  # for tensors of a few hundred numbers a second thread only costs


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
        1, 130,
        dict(mlp_only_layers=[1], intermediate_size=40, num_key_value_heads=1, rms_norm_eps=1e-3),
    ),
    "length 65, every other layer dense, tied": Case(
        2, 65,
        dict(decoder_sparse_step=2, intermediate_size=40, tie_word_embeddings=True,
             num_key_value_heads=4, partial_rotary_factor=0.5),
    ),
    "interval 3, one expert a token": Case(
        2, 33,
        dict(num_hidden_layers=3, full_attention_interval=3, num_experts=11, num_experts_per_tok=1,
             linear_key_head_dim=12, linear_value_head_dim=8, norm_topk_prob=False),
    ),
}  # fmt: skip
DENSE_CASE = Case(2, 75, DENSE)


@functools.cache
def transformers_model(name):
    """The model with transformers' initial weights, and our config of the same."""
    case = CASES.get(name, DENSE_CASE)
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
    case = CASES.get(name, DENSE_CASE)
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
    # Two float32 computations in another order; the logits are of size 1, and differ by 2e-6.
    np.testing.assert_allclose(logits, out.logits, atol=1e-5, rtol=0)

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
    # gradients where there is one key, is rounding on both sides: 1e-7 of the whole gradient.
    whole = np.sqrt(sum((g**2).sum() for g in expected.values()))
    errors = {name: relative_error(grads[name], g, 1e-3 * whole) for name, g in expected.items()}
    assert not {name: e for name, e in errors.items() if e > 1e-4}


@functools.cache
def released_tensors():
    """A checkpoint of the released layout: transformers' tensors, and those of an MTP module."""
    model, config = transformers_model("released pattern")
    tensors = tensors_of(model)
    rng = np.random.default_rng(0)
    D = config.hidden_size
    tensors["mtp.fc.weight"] = rng.standard_normal((D, 2 * D), np.float32)
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        tensors[f"mtp.{name}.weight"] = rng.standard_normal(D, np.float32)
    for name, tensor in list(tensors.items()):
        if name.startswith("model.layers.3."):
            name = name.replace("model.layers.3.", "mtp.layers.0.")
            tensors[name] = rng.standard_normal(tensor.shape, np.float32)
    return tensors, dataclasses.replace(config, mtp_steps=1)


def one_by_one(tensors):
    """Fused experts as the released files hold them."""
    apart = {}
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(tensor):
                gate, up = np.split(both, 2)
                apart[name.replace("gate_up_proj", f"{e}.gate_proj.weight")] = gate
                apart[name.replace("gate_up_proj", f"{e}.up_proj.weight")] = up
        elif name.endswith("experts.down_proj"):
            for e, down in enumerate(tensor):
                apart[name.replace("down_proj", f"{e}.down_proj.weight")] = down
        else:
            apart[name] = tensor
    return apart


@pytest.mark.parametrize("written", ["fused", "per expert"])
@pytest.mark.parametrize("read", ["fused", "per expert"])
def test_loading_and_dumping_gives_the_same_bits_under_the_same_names(read, written):
    tensors, config = released_tensors()
    layouts = {"fused": tensors, "per expert": one_by_one(tensors)}
    model = abstract_model(config)
    load_tensors(model, layouts[read])
    dumped = dump_tensors(nnx.state(model), config, fused_experts=written == "fused")
    expected = layouts[written]
    assert dumped.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(dumped[name], tensor, err_msg=name)


def test_all_that_does_not_fit_is_reported_together_and_nothing_is_loaded():
    tensors, config = released_tensors()
    tensors = dict(tensors)
    del tensors["model.layers.2.linear_attn.A_log"]
    tensors["model.layers.0.self_attn.k_proj.weight"] = np.zeros((3, 5), np.float32)
    tensors["model.norm.weight"] = np.zeros(7, np.float32)
    model = random_model(config)
    before = jax.tree.map(np.asarray, nnx.state(model))
    with pytest.raises(ValueError, match="do not fit") as error:
        load_tensors(model, tensors)
    for complaint in (
        "missing: model.layers.2.linear_attn.A_log [2]",
        "unexpected: model.layers.0.self_attn.k_proj.weight [3, 5]",
        "wrong shape: model.norm.weight is [7], expected [32]",
    ):
        assert complaint in str(error.value)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)


def test_tensors_of_another_model_are_refused():
    tensors, config = released_tensors()
    with pytest.raises(ValueError, match=r"unexpected: mtp\.fc\.weight"):
        load_tensors(abstract_model(dataclasses.replace(config, mtp_steps=0)), tensors)
