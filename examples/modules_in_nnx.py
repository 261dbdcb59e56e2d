"""Gated DeltaNet and a sparse mixture of experts as parts of a Flax NNX model of your own.

    python examples/modules_in_nnx.py

The modules take a config and `rngs`, map [B, T, D] to [B, T, D], and need nothing else of the
library: no mesh, no data format, no training loop. The toy task: each letter of a random string has
a tag, which a fixed random table gives for the letter and the one before it; so the mixer has to
combine two letters and the experts have to learn the table.
"""

import jax
import optax
from flax import nnx

import qwen3next_jax as q3n

LETTERS = 16
TABLE = jax.random.randint(jax.random.key(0), (LETTERS, LETTERS), 0, LETTERS)

# A config has the sizes of a whole Qwen3-Next, of which each module reads its own. A released
# model's config.json, or a dict based on one, works as well.
CONFIG = q3n.ModelConfig.from_hf(
    dict(
        model_type="qwen3_next",
        vocab_size=LETTERS,
        hidden_size=64,
        num_hidden_layers=1,
        full_attention_interval=2,
        max_position_embeddings=64,
        initializer_range=0.1,
        # Gated DeltaNet: two heads, each with a memory of 32 × 32.
        linear_conv_kernel_dim=4,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        # Experts: each token uses two of eight, and the shared one.
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        router_aux_loss_coef=1e-3,
        # Full attention, not used by this model.
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        rope_theta=10_000.0,
        partial_rotary_factor=0.25,
    )
)


class Block(nnx.Module):
    """Any residual block; the two marked lines are all that the modules need."""

    def __init__(self, width, *, rngs):
        self.mixer = q3n.GatedDeltaNet(CONFIG, rngs=rngs)  # <--
        self.moe = q3n.SparseMoE(CONFIG, rngs=rngs)  # <--
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        x = x + self.mixer(self.norms[0](x))
        y, stats = self.moe.with_stats(self.norms[1](x))  # or self.moe(...) for y alone
        return x + y, balance_loss(stats)


class Model(nnx.Module):
    """Embedding, blocks, head."""

    def __init__(self, vocabulary, width, depth, *, rngs):
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, rngs=rngs) for _ in range(depth)])
        self.head = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, tokens):
        x, balance = self.embed(tokens), 0.0
        for block in self.blocks:
            x, block_balance = block(x)
            balance += block_balance / len(self.blocks)
        return self.head(x), balance


def balance_loss(stats):
    """E · Σ_e f_e P_e from the router's statistics: 1 when every expert gets its share.

    f_e is the share of assignments to expert e, P_e its mean probability; without this term a few
    experts tend to get all the tokens.
    """
    share = stats.counts.sum(0) / stats.counts.sum()
    mean_probability = stats.probabilities.sum(0) / stats.tokens.sum()
    return share.size * (share * mean_probability).sum()


def make_batch(key, batch=32, length=32):
    """Random letters, and the table's tag for each of them and the letter before it."""
    letters = jax.random.randint(key, (batch, length + 1), 0, LETTERS)
    return letters, TABLE[letters[:, :-1], letters[:, 1:]]


def loss_fn(model, tokens, targets):
    logits, balance = model(tokens)
    ce = optax.softmax_cross_entropy_with_integer_labels(logits[:, 1:], targets).mean()
    return ce + CONFIG.router_aux_loss_coef * balance, (ce, balance)


@nnx.jit
def train_step(model, optimizer, tokens, targets):
    (_, aux), gradients = nnx.value_and_grad(loss_fn, has_aux=True)(model, tokens, targets)
    optimizer.update(model, gradients)
    return aux


def main(steps=100):
    model = Model(LETTERS, CONFIG.hidden_size, depth=2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)
    losses = []
    for step in range(steps):
        tokens, targets = make_batch(jax.random.key(step))
        ce, balance = train_step(model, optimizer, tokens, targets)
        losses.append(float(ce))
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {ce:.3f} nats a tag  balance {balance:.3f}")
    return losses


if __name__ == "__main__":
    main()
