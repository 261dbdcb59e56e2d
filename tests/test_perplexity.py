import math

import jax.numpy as jnp
import numpy as np
from flax import nnx
from oracles import quick_jit, random_model, small_config

from qwen3next_jax.evaluation.perplexity import perplexity
from qwen3next_jax.training.loss import complete_batch


def test_bits_per_byte_are_the_plain_sum_over_all_tokens_and_batches():
    model = random_model(small_config(mtp_steps=1))
    rows = np.random.default_rng(0).integers(1, 61, (3, 2, 20))
    segments = np.ones((3, 2, 20), np.int32)
    segments[2, 1, 5:] = 0  # a batch that is mostly padding counts by its tokens
    batches = [
        complete_batch(jnp.asarray(t), jnp.asarray(s)) for t, s in zip(rows, segments, strict=True)
    ]
    got = perplexity(*nnx.split(model), batches, text_bytes=333)

    nats = count = 0
    forward = quick_jit(lambda tokens, segments: model(tokens, segments))
    for batch in batches:
        logits = np.asarray(forward(batch["tokens"], batch["segment_ids"]), np.float64)
        log_norms = np.log(np.exp(logits).sum(-1))
        for b, t in np.argwhere(np.asarray(batch["loss_weights"]) > 0):
            nats += log_norms[b, t] - logits[b, t, batch["targets"][b, t]]
            count += 1
    # float32 sums against float64 ones
    np.testing.assert_allclose(got["eval_ce"], nats / count, rtol=1e-5)
    np.testing.assert_allclose(got["eval_bits_per_byte"], nats / math.log(2) / 333, rtol=1e-5)
