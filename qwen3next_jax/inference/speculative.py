"""Speculative decoding: the MTP module drafts several tokens, the model verifies them in one pass.

Drafts cost little, and a pass over a few tokens costs little more than a pass over one, so each
accepted draft is a token almost for free. The distribution of the output does not change: a token x
drafted from q is accepted with probability min(1, p(x) / q(x)), where p is the model's own
distribution, and the first rejected one is replaced by a draw from max(p − q, 0), normalised. The
resulting token then follows p exactly. With greedy decoding p and q have all their mass on one
token, and a draft is accepted if it is the token that the model would have chosen.

Source: Leviathan et al., arXiv:2211.17192; Chen et al., arXiv:2302.01318.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from qwen3next_jax.inference.sampling import Sampling
from qwen3next_jax.model.cache import AttentionCache
from qwen3next_jax.model.decoder import Qwen3Next


def draft(
    model: Qwen3Next,
    hidden: Float[Array, "B T D"],
    next_tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    last: Int[Array, "B"],
    cache: AttentionCache,
    *,
    count: int,
    sampling: Sampling,
    seen: Bool[Array, "B V"] | None,
    key: Key[Array, ""],
) -> tuple[Int[Array, "B K"], Float[Array, "B K V"], AttentionCache]:
    """Drafts K = `count` tokens after a sequence.

    Args:
      model: a model with an MTP module.
      hidden: final hidden states of the newest tokens, followed by padding.
      next_tokens: the token after each of those tokens.
      positions: positions of those tokens.
      last: index in T of each row's last token that is not padding.
      cache: the MTP module's cache of all earlier tokens.
      count: number of tokens to draft.
      sampling: how tokens are drawn, drafts as well as the model's own.
      seen: tokens that the sequence has already, for `Sampling.probabilities`.
      key: PRNG key.

    Returns:
      The drafts, the distributions they were drawn from, and the next cache. The cache entries of
      drafts are overwritten once the real tokens are known.
    """
    assert model.mtp is not None
    row = jnp.arange(len(hidden))
    hidden, _, cache = model.mtp(hidden, model.embed(next_tokens), positions=positions, cache=cache)
    hidden, position = hidden[row, last][:, None], positions[row, last][:, None]
    tokens: list[Array] = []
    distributions: list[Array] = []
    for step_key in jax.random.split(key, count):
        if tokens:
            position += 1
            hidden, _, cache = model.mtp(
                hidden, model.embed(tokens[-1][:, None]), positions=position, cache=cache
            )
        q = sampling.probabilities(model.logits(hidden)[:, 0], seen)
        token = sampling.draw(q, step_key)
        seen = None if seen is None else seen.at[row, token].set(True)
        tokens.append(token)
        distributions.append(q)
    return jnp.stack(tokens, axis=1), jnp.stack(distributions, axis=1), cache


def verify(
    drafts: Int[Array, "B K"],
    q: Float[Array, "B K V"],
    p: Float[Array, "B K+1 V"],
    *,
    sampling: Sampling,
    key: Key[Array, ""],
) -> tuple[Int[Array, "B K+1"], Int[Array, "B"]]:
    """Accepts drafts up to the first rejected one, and adds a token of the model's own.

    Args:
      drafts: drafted tokens.
      q: distributions that the drafts were drawn from.
      p: the model's distributions at the positions of the drafts and at the one after them.
      sampling: how tokens are drawn.
      key: PRNG key.

    Returns:
      Tokens, and the number n of accepted drafts of each row: the first n tokens are drafts, the
      next one is the model's own, the others are meaningless.
    """
    B, K = drafts.shape
    coin_key, draw_key = jax.random.split(key)
    chosen = drafts[..., None]
    p_draft = jnp.take_along_axis(p[:, :K], chosen, axis=2)[..., 0]
    q_draft = jnp.take_along_axis(q, chosen, axis=2)[..., 0]
    accepted = jax.random.uniform(coin_key, (B, K)) * q_draft < p_draft
    count = jnp.cumprod(accepted.astype(jnp.int32), axis=1).sum(1, dtype=jnp.int32)
    # At the position after the last draft nothing was drafted, so q is zero there.
    residual = jnp.maximum(p - jnp.pad(q, ((0, 0), (0, 1), (0, 0))), 0)[jnp.arange(B), count]
    # If p and q differ by less than their rounding, a rejection may leave nothing to draw from.
    left = residual.any(-1, keepdims=True)
    own = sampling.draw(jnp.where(left, residual, p[jnp.arange(B), count]), draw_key)
    tokens = jnp.pad(drafts, ((0, 0), (0, 1)))
    return jnp.where(jnp.arange(K + 1) == count[:, None], own[:, None], tokens), count
