"""Multi-token prediction against a module put together from transformers' layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hf_tensors import dump_tensors
from oracles import (
    SMALL,
    abstract_model,
    quick_jit,
    random_model,
    relative_error,
    segments_of,
    small_config,
)
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.models.qwen3_next import modeling_qwen3_next as theirs

import qwen3next_jax as q3n
from qwen3next_jax.checkpoint.hugging_face import load_tensors
from qwen3next_jax.training.loss import TokenCounts, complete_batch, count_labels

# One attention layer is model enough: MTP sees only its last hidden states.
ONE_LAYER = dict(num_hidden_layers=1, full_attention_interval=1, router_aux_loss_coef=0.0)
MTP_WEIGHT = 0.1


class TorchMTP(torch.nn.Module):
    """fc([norm(embed(next token)) | norm(hidden)]), an attention + MoE layer, its own norm."""

    def __init__(self, model):
        super().__init__()
        config = model.config
        D = config.hidden_size
        self.pre_fc_norm_embedding = theirs.Qwen3NextRMSNorm(D, eps=config.rms_norm_eps)
        self.pre_fc_norm_hidden = theirs.Qwen3NextRMSNorm(D, eps=config.rms_norm_eps)
        self.fc = torch.nn.Linear(2 * D, D, bias=False)
        self.layers = torch.nn.ModuleList([theirs.Qwen3NextDecoderLayer(config, 0)])
        self.norm = theirs.Qwen3NextRMSNorm(D, eps=config.rms_norm_eps)

    def forward(self, hidden, next_embeddings, rope):
        joined = (self.pre_fc_norm_embedding(next_embeddings), self.pre_fc_norm_hidden(hidden))
        x = self.fc(torch.cat(joined, dim=-1))
        return self.norm(self.layers[0](x, position_embeddings=rope))


def torch_model():
    torch.manual_seed(0)
    given = {**SMALL, **ONE_LAYER, "layer_types": ["full_attention"]}
    config = Qwen3NextConfig(**given, initializer_range=0.05)
    config._experts_implementation = "eager"
    model = Qwen3NextForCausalLM(config).eval()
    model.mtp = TorchMTP(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.uniform_(-0.5, 0.5) if "norm" in name else p.normal_(std=0.05)
    return model


def unrolled(model, tokens, steps):
    """Logits of each step at the positions that have all the tokens it reads."""
    hidden = model.model(tokens, use_cache=False).last_hidden_state
    logits = [model.lm_head(hidden)]
    for step in range(1, steps + 1):
        known = tokens.shape[1] - step
        rope = model.model.rotary_emb(hidden, torch.arange(known)[None])
        ahead = model.model.embed_tokens(tokens[:, step:])
        hidden = model.mtp(hidden[:, :known], ahead, rope)
        logits.append(model.lm_head(hidden))
    return logits


@pytest.mark.parametrize("steps", [1, 2])
def test_unrolled_steps_give_the_logits_loss_and_gradients_of_a_module_of_transformers(steps):
    reference = torch_model()
    config = small_config(**ONE_LAYER, mtp_steps=steps)
    model = abstract_model(config)
    load_tensors(model, {n: p.detach().numpy() for n, p in reference.named_parameters()})
    graph, params = nnx.split(model)
    tokens = np.random.default_rng(1).integers(0, 61, (2, 19), dtype=np.int32)

    def loss_and_logits(params, tokens):
        model = nnx.merge(graph, params)
        value, metrics = q3n.loss(model, complete_batch(tokens), mtp_weight=MTP_WEIGHT)
        hidden, logits = model.hidden_states(tokens)[0], []
        for step in range(1, steps + 1):
            # Tokens that are not there any more are wrapped around: nothing before sees them.
            hidden = model.mtp(hidden, model.embed(jnp.roll(tokens, -step, axis=1)))[0]
            logits.append(model.logits(hidden)[:, :-step])
        return value, (metrics, logits)

    (value, (metrics, logits)), grads = quick_jit(
        jax.value_and_grad(loss_and_logits, has_aux=True)
    )(params, jnp.asarray(tokens))

    tokens = torch.tensor(tokens).long()
    expected = unrolled(reference, tokens, steps)
    terms = [
        torch.nn.functional.cross_entropy(
            out[:, :-1].flatten(0, 1), tokens[:, step + 1 :].flatten()
        )
        for step, out in enumerate(expected)
    ]
    mtp_ce = sum(terms[1:]) / steps
    total = terms[0] + MTP_WEIGHT * mtp_ce
    total.backward()

    # Float32 both, in another order; logits are of size 1.
    for ours, theirs_ in zip(logits, expected[1:], strict=True):
        np.testing.assert_allclose(ours, theirs_.detach(), atol=1e-5)
    for ours, theirs_ in ((metrics["ce"], terms[0]), (metrics["mtp_ce"], mtp_ce), (value, total)):
        np.testing.assert_allclose(ours, theirs_.item(), rtol=1e-5)
    grads = dump_tensors(grads, config, fused_experts=True)
    wanted = {name: p.grad.numpy() for name, p in reference.named_parameters()}
    assert grads.keys() == wanted.keys()
    whole = np.sqrt(sum((g**2).sum() for g in wanted.values()))
    errors = {name: relative_error(grads[name], g, 1e-3 * whole) for name, g in wanted.items()}
    assert not {name: e for name, e in errors.items() if e > 1e-4}


def test_packed_documents_give_the_mtp_losses_they_give_alone():
    """And their last tokens, which have nothing to predict, none."""
    lengths = (1, 9, 2, 3, 6)
    model = random_model(small_config(**ONE_LAYER, mtp_steps=2))
    graph, params = nnx.split(model)
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 61, n, dtype=np.int32) for n in lengths]

    @quick_jit
    def sums(params, tokens, segment_ids):
        """Of each step, the summed cross-entropy of its labels."""
        batch = complete_batch(tokens, segment_ids)
        return [
            # Dividing a step's sum by infinity leaves the other's; both are halved in the mean.
            2
            * q3n.loss(nnx.merge(graph, params), batch, counts=TokenCounts(jnp.ones(()), counts))[
                1
            ]["mtp_ce"]
            for counts in (jnp.array([1.0, jnp.inf]), jnp.array([jnp.inf, 1.0]))
        ]

    def row(documents):
        tokens = np.concatenate(documents)
        return (
            jnp.asarray(np.pad(tokens, (0, 24 - len(tokens)))[None]),
            jnp.asarray(segments_of(*map(len, documents), total=24)),
        )

    packed = sums(params, *row(documents))
    alone = np.array([sums(params, *row([document])) for document in documents])
    # Sums of a dozen losses of size 4, each known to float32's 2e-7.
    np.testing.assert_allclose(packed, alone.sum(0), rtol=1e-5)
    labels = np.array([[max(n - 2, 0), max(n - 3, 0)] for n in lengths])
    assert ((alone > 0) == (labels > 0)).all()
    # In a vocabulary of 61 a random model's loss is about log 61 for each label.
    np.testing.assert_allclose(alone[labels > 0] / labels[labels > 0], np.log(61), rtol=0.5)
    counts = count_labels(complete_batch(*row(documents)), 2)
    np.testing.assert_array_equal(counts.mtp, labels.sum(0))
    assert counts.ce == sum(n - 1 for n in lengths)
