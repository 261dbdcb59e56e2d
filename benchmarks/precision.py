"""What bfloat16 loses where numbers are summed again and again: gradients, moments, parameters.

    python benchmarks/precision.py

- gradients: the parts of N devices, each signal + noise, added one after another in bfloat16; the
  error relative to their exact sum.
- moments: AdamW's update after 400 steps with first moments in bfloat16, as a share of that with
  moments in float32; the gradient is a fixed one + noise.
- parameters: 1000 steps of AdamW at a learning rate of 1e-5 towards the minimum of a quadratic,
  from weights of 0.02 that are 0.01 away; the distance that is left, and the entries that the last
  step changed.

Noise is given relative to the signal. The numbers do not depend on the machine but for rounding.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qwen3next_jax.config import OptimizerConfig
from qwen3next_jax.training.optimizer import make_optimizer

RNG = np.random.default_rng(0)


def main():
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print("gradients of N devices: error of the sum in bfloat16\n   N  noise 0      1      3")
    for devices in (64, 512):
        errors = [error_of_sum(devices, noise) for noise in (0, 1, 3)]
        print(f"{devices:4}  " + "".join(f"{error:7.1%}" for error in errors))
    print("\nfirst moments in bfloat16: share of the update\n  b1  noise 0    0.1    0.3")
    for b1 in (0.9, 0.95, 0.99):
        shares = [share_of_update(b1, noise) for noise in (0, 0.1, 0.3)]
        print(f"{b1:4}  " + "".join(f"{share:7.1%}" for share in shares))
    print("\nparameters: distance before and after, entries changed in the last step")
    for dtype in (jnp.float32, jnp.bfloat16):
        before, after, changed = descent(dtype)
        print(f"{jnp.dtype(dtype).name:8}  {before:.2f}  {after:.2f}  {changed:.1%}")


def error_of_sum(devices, noise):
    signal = RNG.normal(size=4096)
    parts = signal + noise * RNG.normal(size=(devices, 4096))
    parts = parts.astype(jnp.bfloat16)
    total = parts[0]
    for part in parts[1:]:
        total = (total.astype(np.float32) + part.astype(np.float32)).astype(jnp.bfloat16)
    exact = parts.astype(np.float64).sum(0)
    return np.linalg.norm(total.astype(np.float64) - exact) / np.linalg.norm(exact)


def adamw(params, *, moments=jnp.float32, **changes):
    given = dict(
        name="adamw", learning_rate=1e-5, schedule="constant", warmup_steps=0, decay_fraction=0.2,
        final_fraction=0.1, weight_decay=0.0, b1=0.9, b2=0.95, eps=1e-8, clip_norm=0.0,
    )  # fmt: skip
    config = OptimizerConfig(**{**given, **changes})
    return make_optimizer(config, 1000, params, moment_dtype=moments)[0]


def share_of_update(b1, noise):
    signal = jnp.asarray(RNG.normal(size=(64, 64)), jnp.float32)
    params = {"lm_head": jnp.zeros_like(signal)}

    def last_update(moments):
        optimizer = adamw(params, moments=moments, b1=b1)

        def step(state, key):
            grad = signal * (1 + noise * jax.random.normal(key, signal.shape))
            update, state = optimizer.update({"lm_head": grad}, state, params)
            return state, update["lm_head"]

        keys = jax.random.split(jax.random.key(0), 400)
        return jax.jit(lambda: jax.lax.scan(step, optimizer.init(params), keys)[1][-1])()

    exact, rounded = last_update(jnp.float32), last_update(jnp.bfloat16)
    return float(jnp.vdot(rounded, exact) / jnp.vdot(exact, exact))


def descent(dtype):
    start = jnp.asarray(RNG.normal(scale=0.02, size=(256, 256)), jnp.float32)
    minimum = start + 0.01 * jnp.asarray(RNG.normal(size=start.shape), jnp.float32)
    params = {"lm_head": start.astype(dtype)}
    optimizer = adamw(params)

    def step(carry, key):
        params, state = carry
        grad = params["lm_head"].astype(jnp.float32) - minimum
        grad += 0.01 * jax.random.normal(key, start.shape)
        updates, state = optimizer.update({"lm_head": grad}, state, params)
        after = optax.apply_updates(params, updates)
        return (after, state), (after["lm_head"] != params["lm_head"]).mean()

    keys = jax.random.split(jax.random.key(0), 1000)
    (after, _), changed = jax.jit(
        lambda: jax.lax.scan(step, (params, optimizer.init(params)), keys)
    )()
    distances = (
        jnp.linalg.norm(x["lm_head"].astype(jnp.float32) - minimum) for x in (params, after)
    )
    return *map(float, distances), float(changed[-1])


if __name__ == "__main__":
    main()
