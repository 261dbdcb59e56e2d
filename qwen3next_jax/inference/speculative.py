"""Speculative decoding: the MTP module drafts several tokens, the model checks them in one pass.

Drafts cost little, and a pass over a few tokens costs little more than a pass over one, so each
draft that is accepted is a token almost for free. Which tokens come out does not change: a drafted
token x, drawn from the draft's distribution q, is kept with probability min(1, p(x) / q(x)) for the
model's own p, and the first one refused is replaced by a draw from max(p − q, 0), normalised. The
token that is written then follows p exactly. With greedy decoding p and q have one token each, and
the rule says: keep what the model would have chosen.

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
      model: one with an MTP module.
      hidden: the model's final hidden states of its newest tokens, padding behind them.
      next_tokens: the token after each of those.
      positions: of those tokens.
      last: of each row, the index in T of its last real token.
      cache: the MTP module's, over all earlier tokens.
      count: tokens to draft.
      sampling: how the model's own tokens are chosen; drafts are chosen likewise.
      seen: see `Sampling.probabilities`.
      key: for drawing.

    Returns:
      The drafts, the distributions they were drawn from, and the next cache. What it holds of
      drafts will be overwritten once the real tokens are known.
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
    """Accepts drafts up to the first one refused, and adds a token of the model's own.

    Args:
      drafts: drafted tokens.
      q: what each was drawn from.
      p: the model's distribution of the token at each of these places, and at the one after.
      sampling: says how to draw.
      key: for drawing.

    Returns:
      Tokens, and for each row the number of drafts kept: so many of the tokens are drafts, the next
      is the model's own, the rest mean nothing.
    """
    B, K = drafts.shape
    coin_key, draw_key = jax.random.split(key)
    chosen = drafts[..., None]
    p_draft = jnp.take_along_axis(p[:, :K], chosen, axis=2)[..., 0]
    q_draft = jnp.take_along_axis(q, chosen, axis=2)[..., 0]
    accepted = jax.random.uniform(coin_key, (B, K)) * q_draft < p_draft
    kept = jnp.cumprod(accepted.astype(jnp.int32), axis=1).sum(1, dtype=jnp.int32)
    # After the last draft nothing was drafted, and q is zero.
    left = jnp.maximum(p - jnp.pad(q, ((0, 0), (0, 1), (0, 0))), 0)
    own = sampling.draw(left[jnp.arange(B), kept], draw_key)
    tokens = jnp.pad(drafts, ((0, 0), (0, 1)))
    return jnp.where(jnp.arange(K + 1) == kept[:, None], own[:, None], tokens), kept
