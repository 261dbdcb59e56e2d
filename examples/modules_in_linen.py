"""The same modules in a Flax Linen model, for code that has not moved to NNX.

    python examples/modules_in_linen.py

`flax.nnx.bridge.ToLinen(Module, args=..., kwargs=...)` wraps an NNX module as a Linen module. Linen
supplies the random keys, hence no `rngs` here, and the parameters are in `variables["params"]`,
boxed with their axes' names as by `nn.with_partitioning`: init, apply and optax are used as always,
and `nn.meta.unbox` gives plain arrays. The task is that of modules_in_nnx.py, letters tagged by a
table.
"""

import flax.linen as nn
import jax
import optax
from flax.nnx import bridge
from modules_in_nnx import CONFIG, LETTERS, balance_loss, make_batch

import qwen3next_jax as q3n


class Block(nn.Module):
    """A Linen block with two NNX modules in it."""

    @nn.compact
    def __call__(self, x):
        x = x + bridge.ToLinen(q3n.GatedDeltaNet, args=(CONFIG,), name="mixer")(nn.LayerNorm()(x))
        moe = bridge.ToLinen(q3n.SparseMoE, args=(CONFIG,), name="moe")
        y, stats = moe(nn.LayerNorm()(x), nnx_method="with_stats")
        return x + y, balance_loss(stats)


class Model(nn.Module):
    """Embedding, blocks, head."""

    vocabulary: int
    width: int
    depth: int

    @nn.compact
    def __call__(self, tokens):
        x, balance = nn.Embed(self.vocabulary, self.width)(tokens), 0.0
        for _ in range(self.depth):
            x, block_balance = Block()(x)
            balance += block_balance / self.depth
        return nn.Dense(self.vocabulary)(x), balance


def main(steps=100):
    model = Model(LETTERS, CONFIG.hidden_size, depth=2)
    optimizer = optax.adamw(3e-3)
    params = model.init(jax.random.key(0), make_batch(jax.random.key(0))[0])["params"]
    state = optimizer.init(params)

    def loss_fn(params, tokens, targets):
        logits, balance = model.apply({"params": params}, tokens)
        ce = optax.softmax_cross_entropy_with_integer_labels(logits[:, 1:], targets).mean()
        return ce + CONFIG.router_aux_loss_coef * balance, (ce, balance)

    @jax.jit
    def train_step(params, state, tokens, targets):
        (_, aux), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params, tokens, targets)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, aux

    losses = []
    for step in range(steps):
        tokens, targets = make_batch(jax.random.key(step))
        params, state, (ce, balance) = train_step(params, state, tokens, targets)
        losses.append(float(ce))
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {ce:.3f} nats a tag  balance {balance:.3f}")
    return losses


if __name__ == "__main__":
    main()
