"""What the delta term and the decay are each good for, on three memory tasks.

    python examples/associative_recall.py [--output=DIR] [--quick]

A Gated DeltaNet layer keeps one matrix S for all it has read, and updates it token by token:

    S_t = exp(g_t) (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ
          the decay   the delta term            the write

The write alone is linear attention: all earlier values stay in S and are read along with new ones.
The delta term first removes what S stores under *this* key. The decay shrinks what S stores under
*every* key. So each should win on tasks that need its kind of forgetting. A row of a task is 8
writes (a key token, a value token), then 16 questions (a key token, to which the model is to answer
the value):

- recall: multi-query associative recall (MQAR, Arora et al., arXiv:2312.04927). Each key is bound
  once. Up to 8 keys out of 16 share heads of 8 dimensions, in which 16 keys cannot be orthogonal,
  so bindings interfere. The delta term should help: it writes only the difference from the value
  already stored.
- rebinding: a few keys are bound again and again, and the latest value counts. Forgetting one
  binding without its neighbours is what the delta term does; a decay forgets them all alike.
- reset: a reset token voids all earlier writes. The answer to keys not bound since is "none". One
  token with a large decay does that, whereas the delta term erases one key at a time.

The stack is two layers, x + mixer(norm(x)) without feed-forward, so that all memory is in the
mixers. The variants: the library's gated delta rule; without the delta term (gated linear
attention); without the decay (DeltaNet); without both (linear attention); the hybrid (one delta
layer, one of gated attention); gated attention alone; and one layer instead of two, with the decay
and without, since a second layer may make up for what the first cannot do.

Results (benchmarks/results/2026-11-23-associative-recall.md): rebinding needs the delta term, as
expected. Recall did not profit from it, and the reset did not need the decay: with two layers the
full rule scored lower on both than the rule without decay. All variants are trained briefly, with
one learning rate and two seeds, so a low number may mean slow to learn rather than unable.
"""

import argparse
import datetime
import functools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import qwen3next_jax as q3n
from qwen3next_jax.data.files import import_extra

WRITES, QUESTIONS, KEYS, VALUES = 8, 16, 16, 16
BLANK, RESET, NONE = 0, 1, 2
FIRST_KEY, FIRST_VALUE, VOCAB = 3, 3 + KEYS, 3 + KEYS + VALUES

CONFIG = q3n.ModelConfig.from_hf(
    dict(
        model_type="qwen3_next",
        vocab_size=VOCAB,
        hidden_size=64,
        max_position_embeddings=32,
        num_hidden_layers=2,
        full_attention_interval=2,
        initializer_range=0.1,
        linear_conv_kernel_dim=4,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=16,  # less room than 16 keys need
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        rope_theta=10_000.0,
        partial_rotary_factor=0.25,
        # No experts and no feed-forward here, but a config is that of a whole model.
        num_experts=0,
        num_experts_per_tok=0,
        moe_intermediate_size=0,
        shared_expert_intermediate_size=0,
        intermediate_size=64,
    )
)


# --- The tasks ---------------------------------------------------------------------------------


def make_batch(task, key, batch):
    """Draws rows of a task.

    Returns:
      tokens [B, T], the targets of the last QUESTIONS of them, and each row's level [B], an index
      into the task's LEVELS.
    """
    ks = jax.random.split(key, 5)
    level = jax.random.randint(ks[0], (batch,), 0, len(LEVELS[task]))
    amount = jnp.array(LEVELS[task])[level][:, None]
    names = _permutation(ks[1], batch, KEYS)  # the row uses the first few of these keys
    values = jax.random.randint(ks[2], (batch, WRITES), 0, VALUES)
    slot = jnp.arange(WRITES)
    blank = reset = jnp.zeros((batch, WRITES), bool)
    if task == "recall":  # `amount` pairs, after blanks
        blank = slot < WRITES - amount
        written = jnp.broadcast_to(slot, (batch, WRITES))
        asked = jax.random.randint(ks[3], (batch, QUESTIONS), WRITES - amount, WRITES)
    elif task == "rebinding":  # all writes go to `amount` keys; questions are about written keys
        written = jax.random.randint(ks[4], (batch, WRITES), 0, amount)
        asked = jax.random.randint(ks[3], (batch, QUESTIONS), 0, WRITES)
        asked = jnp.take_along_axis(written, asked, axis=1)
    else:  # a reset followed by `amount` writes; questions are about any of four keys
        written = jax.random.randint(ks[4], (batch, WRITES), 0, 4)
        reset = slot == WRITES - 1 - amount
        asked = jax.random.randint(ks[3], (batch, QUESTIONS), 0, 4)

    # The answer is the last write under the key asked for, if it came after the last reset.
    matches = (written[:, None] == asked[..., None]) & ~reset[:, None]  # [B, questions, writes]
    last = jnp.where(matches, slot, -1).max(-1)
    valid = last > jnp.where(reset, slot, -1).max(-1, keepdims=True)
    answers = jnp.take_along_axis(values, last, axis=1) + FIRST_VALUE
    targets = jnp.where(valid, answers, NONE)

    pairs = jnp.stack([_named(names, written) + FIRST_KEY, values + FIRST_VALUE], axis=-1)
    pairs = jnp.where(blank[..., None], BLANK, jnp.where(reset[..., None], RESET, pairs))
    questions = _named(names, asked) + FIRST_KEY
    return jnp.concatenate([pairs.reshape(batch, -1), questions], axis=1), targets, level


# What makes a row harder: pairs to remember; keys the 8 writes share; writes since the reset.
LEVELS = {"recall": (2, 4, 8), "rebinding": (4, 2, 1), "reset": (6, 4, 2)}
MEANING = {"recall": "pairs", "rebinding": "keys", "reset": "writes since"}


def _permutation(key, batch, size):
    return jnp.argsort(jax.random.uniform(key, (batch, size)), axis=1)


def _named(names, index):
    return jnp.take_along_axis(names, index, axis=1)


# --- The models --------------------------------------------------------------------------------


class AblatedDeltaNet(q3n.GatedDeltaNet):
    """The library's layer, with the same parameters, but without parts of its rule."""

    def __init__(self, config, *, rngs, delta=True, decay=True):
        super().__init__(config, rngs=rngs)
        self.delta, self.decay = delta, decay

    def __call__(self, x):
        def project(w):
            return jnp.tensordot(x, w[...], axes=1)

        def unit(x):
            return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-6)

        q, k, v = (
            q3n.ops.causal_conv(project(w), conv[...], activation="silu")
            for w, conv in (
                (self.q_proj, self.q_conv),
                (self.k_proj, self.k_conv),
                (self.v_proj, self.v_conv),
            )
        )
        beta = jax.nn.sigmoid(project(self.b_proj))
        g = -jnp.exp(self.A_log[...]) * jax.nn.softplus(project(self.a_proj) + self.dt_bias[...])
        rule = q3n.ops.gated_delta_rule if self.delta else gated_linear_attention
        out, _ = rule(
            unit(q) * q.shape[-1] ** -0.5,
            unit(k),
            v,
            log_decay=g if self.decay else jnp.zeros_like(g),
            beta=beta,
        )
        out = out * jax.lax.rsqrt((out * out).mean(-1, keepdims=True) + self.eps)
        out = out * self.norm.weight[...] * jax.nn.silu(project(self.z_proj))
        return jnp.tensordot(out, self.out_proj[...], axes=2)


def gated_linear_attention(q, k, v, *, log_decay, beta):
    """S_t = exp(g_t) S_{t−1} + β_t k_t v_tᵀ, o_t = S_tᵀ q_t, all tokens at once; no final state."""
    total = log_decay.cumsum(1).swapaxes(1, 2)  # [B, N, T]
    causal = np.tri(q.shape[1], dtype=bool)
    decay = jnp.exp(jnp.where(causal, total[..., :, None] - total[..., None, :], -jnp.inf))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * decay
    return jnp.einsum("bnts,bsn,bsnp->btnp", scores, beta, v), None


class Stack(nnx.Module):
    """A stack of token mixers, each after a norm and with a residual connection."""

    def __init__(self, mixers, rngs):
        init = nnx.initializers.normal(0.1)
        self.embed = nnx.Embed(VOCAB, CONFIG.hidden_size, embedding_init=init, rngs=rngs)
        self.mixers = nnx.List([mixer(CONFIG, rngs=rngs) for mixer in mixers])
        for mixer in self.mixers:
            if isinstance(mixer, q3n.GatedDeltaNet):
                _start_small(mixer)
        self.norms = nnx.List([q3n.RMSNorm(CONFIG) for _ in mixers])
        self.norm = q3n.RMSNorm(CONFIG)
        self.head = nnx.Linear(CONFIG.hidden_size, VOCAB, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x))
        return self.head(self.norm(x))


def _start_small(layer):
    """Initial values for a stack of four small heads, the same for all delta variants.

    With the library's initial values most heads remember less than one token (the median of g is
    −10), and filters with small random taps hardly distinguish a token from the one before it:
    stacks of this size then stay at chance for hundreds of steps.
    """
    layer.dt_bias[...] = jnp.linspace(-7.0, -3.0, layer.dt_bias.shape[0])  # median g −0.007, −0.4
    for taps in (layer.q_conv, layer.k_conv, layer.v_conv):
        # Mostly the token itself, with a little of the three before it.
        taps[...] = (4 * taps[...]).at[-1].add(1.0)


VARIANTS = {
    "gated delta rule": (q3n.GatedDeltaNet,) * 2,
    "no delta term": (functools.partial(AblatedDeltaNet, delta=False),) * 2,
    "no decay": (functools.partial(AblatedDeltaNet, decay=False),) * 2,
    "neither": (functools.partial(AblatedDeltaNet, delta=False, decay=False),) * 2,
    "hybrid": (q3n.GatedDeltaNet, q3n.GatedAttention),
    "attention": (q3n.GatedAttention,) * 2,
    "one layer": (q3n.GatedDeltaNet,),
    "one layer, no decay": (functools.partial(AblatedDeltaNet, decay=False),),
}


# --- Training and measuring --------------------------------------------------------------------


def make_trainer(mixers, *, steps, learning_rate):
    """Returns init, step and accuracy of a stack, each mapped over seeds.

    Models that differ only in their seed are mapped by `vmap`: compiled once, trained together.
    """
    graph = nnx.graphdef(Stack(mixers, nnx.Rngs(0)))
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 10, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def init(key):
        params = nnx.state(Stack(mixers, nnx.Rngs(key)))
        return params, optimizer.init(params)

    def loss(params, tokens, targets):
        logits = nnx.merge(graph, params)(tokens)[:, -QUESTIONS:]
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def step(params, optimizer_state, tokens, targets):
        value, gradients = jax.value_and_grad(loss)(params, tokens, targets)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state)
        return optax.apply_updates(params, updates), optimizer_state, value

    def correct(params, tokens, targets):
        logits = nnx.merge(graph, params)(tokens)[:, -QUESTIONS:]
        return (logits.argmax(-1) == targets).mean(-1)

    return tuple(jax.jit(jax.vmap(f)) for f in (init, step, correct))


def study(*, steps=700, batch=32, seeds=2, learning_rate=1e-2, variants=tuple(VARIANTS)):
    """Trains every variant on every task; returns a record for each variant and task."""
    records = []
    for name in variants:
        trainer = make_trainer(VARIANTS[name], steps=steps, learning_rate=learning_rate)
        for task in LEVELS:
            started = time.perf_counter()
            accuracy, curve = train(trainer, task, steps=steps, batch=batch, seeds=seeds)
            seconds = round(time.perf_counter() - started, 1)
            records.append(
                dict(variant=name, task=task, accuracy=accuracy, loss=curve, seconds=seconds)
            )
            means = "  ".join(f"{a:.2f}" for a in np.mean(accuracy, axis=0))
            print(f"{task:<10} {name:<19} accuracy {means}  ({seconds:.0f} s)", flush=True)
    return records


def train(trainer, task, *, steps, batch, seeds):
    """Trains a stack on a task; returns accuracies [seeds, levels] and some of the losses."""
    init, step, correct = trainer
    draw = jax.jit(jax.vmap(functools.partial(make_batch, task, batch=batch)))
    params, state = init(jax.random.split(jax.random.key(0), seeds))
    losses = []
    for i in range(steps):
        tokens, targets, _ = draw(jax.random.split(jax.random.key(1 + i), seeds))
        params, state, loss = step(params, state, tokens, targets)
        losses.append(loss)
    tokens, targets, level = evaluation_rows(task)
    right = correct(params, *(jnp.stack([x] * seeds) for x in (tokens, targets)))
    accuracy = jnp.stack([right[:, level == j].mean(1) for j in range(len(LEVELS[task]))], axis=1)
    return accuracy.tolist(), np.stack(losses[:: max(steps // 50, 1)], axis=1).tolist()


def evaluation_rows(task):
    """Rows that no training step draws, the same for all variants."""
    keys = jnp.stack([jax.random.key(10**6 + i) for i in range(16)])
    rows = jax.vmap(functools.partial(make_batch, task, batch=32))(keys)
    return tuple(x.reshape(-1, *x.shape[2:]) for x in rows)


def without_memory(task):
    """The accuracy of a guess at each level: some value, or "none" where that is likelier."""
    _, targets, level = evaluation_rows(task)
    none = [float((targets[level == j] == NONE).mean()) for j in range(len(LEVELS[task]))]
    return [max(share, 1 / VALUES) for share in none]


# --- Reporting ---------------------------------------------------------------------------------


def table(records):
    """A Markdown table of accuracy by variant, task and level: mean over seeds (range)."""
    lines = [[""], ["---"], ["guess"]]
    for task, levels in LEVELS.items():
        lines[0] += [f"{task}: {level} {MEANING[task]}" for level in levels]
        lines[1] += ["---"] * len(levels)
        lines[2] += [f"{guess:.2f}" for guess in without_memory(task)]
    by = {(r["variant"], r["task"]): np.array(r["accuracy"]) for r in records}
    for name in dict.fromkeys(variant for variant, _ in by):
        columns = np.concatenate([by[name, task] for task in LEVELS], axis=1).T
        lines.append([name] + [f"{x.mean():.2f} ({x.min():.2f}–{x.max():.2f})" for x in columns])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(records, path):
    """Plots accuracy over difficulty: a panel for each task, a line for each variant."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(LEVELS), figsize=(13, 3.6), sharey=True)
    for panel, (task, levels) in zip(panels, LEVELS.items(), strict=True):
        x = range(len(levels))
        for i, record in enumerate(r for r in records if r["task"] == task):
            y = np.array(record["accuracy"])
            panel.plot(x, y.mean(0), f"C{i}{'o^vsDPx+'[i]}-", label=record["variant"])
            panel.fill_between(x, y.min(0), y.max(0), color=f"C{i}", alpha=0.12)
        panel.plot(x, without_memory(task), "k:", linewidth=1, label="guess")
        panel.set(title=task, xlabel=MEANING[task], ylim=(0, 1.03))
        panel.set_xticks(x, levels)
    panels[0].set_ylabel("accuracy")
    panels[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("associative_recall"))
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args(argv)
    import_extra("matplotlib", extra="examples")  # before the work, not after it
    sizes = dict(steps=args.steps, seeds=args.seeds, variants=args.variants)
    if args.quick:
        sizes |= dict(steps=3, seeds=1, batch=2)
    records = study(**sizes)
    args.output.mkdir(parents=True, exist_ok=True)
    report = dict(date=datetime.date.today().isoformat(), **sizes, records=records)
    (args.output / "associative_recall.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.output / "associative_recall.md").write_text(table(records) + "\n")
    plot(records, args.output / "associative_recall.png")
    print("\n" + table(records))
    return records


if __name__ == "__main__":
    main()
