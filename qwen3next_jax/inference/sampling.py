"""From logits to the distribution that the next token is drawn from.

The options are applied in the order that transformers applies them: repetition penalty,
temperature, top-k, top-p, min-p. Greedy decoding is the distribution with all its mass on the
likeliest token, so code that compares distributions or draws from them needs no special case.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
      temperature: divisor of the logits, at least 0; 0 takes the likeliest token.
      top_k: number of likeliest tokens to keep; None: all.
      top_p: keep the likeliest tokens that together have this probability (Holtzman et al.,
        arXiv:1904.09751), in (0, 1].
      min_p: keep tokens of at least this share of the likeliest one's probability (Nguyen et al.,
        arXiv:2407.01082), in [0, 1].
      repetition_penalty: logits of tokens already in the sequence, the prompt included, are
        divided by it if positive and multiplied by it if negative (Keskar et al.,
        arXiv:1909.05858); 1 changes nothing.

    Raises:
      ValueError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self):
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            if isinstance(value, str) or (value is None and not name.endswith("_p")):
                raise ValueError(f"{name}={value!r} must be a number")
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature} must be at least 0 (0: greedy)")
        if self.top_k is not None:
            require_integers(top_k=self.top_k)
            if self.top_k < 1:
                raise ValueError(
                    f"top_k={self.top_k} must be an integer of at least 1, or None to keep all "
                    "tokens"
                )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1], or be None")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must lie in [0, 1], or be None")
        if not 1e-30 <= self.repetition_penalty <= 1e30:  # logits must stay finite
            raise ValueError(
                f"repetition_penalty={self.repetition_penalty} must be above 0 and finite, from "
                "1e-30 to 1e30 (1: none)"
            )

    @property
    def needs_seen(self) -> bool:
        """Whether `probabilities` needs to know which tokens the sequence has."""
        return self.repetition_penalty != 1

    @property
    def _is_greedy(self) -> bool:
        """Whether the temperature is 0, or so small that float32 flushes it to 0."""
        return self.temperature < float(jnp.finfo(jnp.float32).tiny)

    def probabilities(
        self, logits: Float[Array, "*B V"], seen: Bool[Array, "*B V"] | None = None
    ) -> Float[Array, "*B V"]:
        """The distribution that tokens are drawn from, float32.

        Args:
          logits: the model's logits, float32.
          seen: which tokens the sequence has already; only a repetition penalty needs it.
        """
        if self.needs_seen:
            penalty = self.repetition_penalty
            penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
            logits = jnp.where(jnp.asarray(seen), penalized, logits)
        if self._is_greedy:
            return jax.nn.one_hot(logits.argmax(-1), logits.shape[-1])
        # The maximum is subtracted before the division, since a small temperature makes logits so
        # large that their last bit is worth many nats: the softmax's own subtraction, fused with
        # the division, would leave differences whose exponentials are infinite.
        logits = (logits - logits.max(-1, keepdims=True)) / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = jax.lax.top_k(logits, self.top_k)[0][..., -1:]
            logits = jnp.where(logits >= least, logits, -jnp.inf)
        probabilities = jax.nn.softmax(logits)
        if self.top_p is not None and self.top_p < 1:
            # A mass that float32 flushes to 0 would be reached without any token.
            mass = max(self.top_p, float(jnp.finfo(jnp.float32).tiny))
            probabilities = _at_least(probabilities, _least_of_top(probabilities, mass))
        if self.min_p is not None:
            least = self.min_p * probabilities.max(-1, keepdims=True)
            probabilities = _at_least(probabilities, least)
        return probabilities

    def draw(self, weights: Float[Array, "*B V"], key: Key[Array, ""]) -> Int[Array, "*B"]:
        """Draws tokens with probabilities proportional to `weights`."""
        if self._is_greedy:
            return weights.argmax(-1).astype(jnp.int32)
        # By default JAX draws tokens of probabilities below 1e-6 too rarely, and a large vocabulary
        # has many of them.
        return jax.random.categorical(key, jnp.log(weights), mode="high").astype(jnp.int32)


def require_integers(**values: Any) -> None:
    """Raises a ValueError for the first argument that is not an `int` or a numpy integer."""
    for name, value in values.items():
        if not isinstance(value, int | np.integer):
            raise ValueError(f"{name}={value!r} must be an integer")


def _at_least(probabilities, least):
    kept = jnp.where(probabilities >= least, probabilities, 0)
    return kept / kept.sum(-1, keepdims=True)


def _least_of_top(probabilities, mass):
    """The smallest probability among the likeliest tokens that together have `mass`.

    Non-negative floats are ordered as their bits are, so the result is determined bit by bit from
    the highest. These 31 sums cost less than sorting the vocabulary.
    """

    def try_bit(i, least):
        candidate = least | (1 << (30 - i))
        floor = jax.lax.bitcast_convert_type(candidate, jnp.float32)
        enough = jnp.where(probabilities >= floor, probabilities, 0).sum(-1, keepdims=True) >= mass
        return jnp.where(enough, candidate, least)

    none = jnp.zeros((*probabilities.shape[:-1], 1), jnp.int32)
    return jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, 31, try_bit, none), jnp.float32)
