"""A model as the suites use it: it scores rows of tokens and continues prompts of any length.

Requests come in all lengths, and each shape must be compiled. So lengths are rounded up to one of a
few (64, 96, 128, 192, 256, ...), a row holds one document followed by padding, and a partial batch
is filled up with padding. No token attends to padding, so results depend on batch size, padding and
mesh only by float32 rounding; only sampled texts are others in other batches.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float32, Int

from qwen3next_jax.data.text_stream import TextStream
from qwen3next_jax.data.tokenizer import Tokenizer, split_stops
from qwen3next_jax.inference.decode import Generation
from qwen3next_jax.model.decoder import Qwen3Next
from qwen3next_jax.ops.delta_rule import CHUNK
from qwen3next_jax.ops.platform import forward_program
from qwen3next_jax.ops.segments import default_positions
from qwen3next_jax.parallel.mesh import BATCH, ROWS, mesh_of
from qwen3next_jax.parallel.processes import ShouldStop, unless_stopped
from qwen3next_jax.parallel.vocabulary import token_scores

_SHORTEST = 64
_TOKENS = 8192  # per batch and device, if no batch size is given


class RowScores(NamedTuple):
    """Scores of a row's tokens, except the first, which is not predicted."""

    losses: Float32[np.ndarray, " _"]  # −log p in nats
    margins: Float32[np.ndarray, " _"]  # largest logit minus the token's; 0 if that is the largest


class Evaluator:
    """Scores and generates text with a model and its tokenizer.

    Attributes:
      model: the model, on one device or a mesh.
      tokenizer: the model's tokenizer.
    """

    def __init__(
        self,
        model: Qwen3Next,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 0,
        should_stop: ShouldStop = lambda: False,
    ):
        """Wraps a model.

        Args:
          model: the model, on one device or a mesh.
          tokenizer: the model's tokenizer.
          batch_size: rows at a time, rounded up to a multiple of the ways in which the mesh shards
            rows; 0: 8192 tokens a device.
          should_stop: asked before each batch; once it returns True, methods raise `Stopped`.

        Raises:
          ValueError: the batch size is negative.
        """
        if batch_size < 0:
            raise ValueError(f"{batch_size=} must be at least 1, or 0 to choose it by length")
        self.model, self.tokenizer = model, tokenizer
        self._batch_size, self._should_stop = batch_size, should_stop
        self._graph, self._params = nnx.split(model)
        self._mesh = mesh_of(self._params)
        self._ways = 1 if self._mesh is None else math.prod(self._mesh.shape[a] for a in ROWS)

    def with_model(self, model: Qwen3Next) -> "Evaluator":
        """An evaluator of another model, otherwise like this one."""
        return Evaluator(
            model, self.tokenizer, batch_size=self._batch_size, should_stop=self._should_stop
        )

    def score(self, rows: Sequence[Sequence[int]]) -> list[RowScores]:
        """Scores each token given the earlier ones of its row.

        Args:
          rows: token lists, each a document; the model reads all tokens of a row but the last.

        Returns:
          The scores of each row's tokens.

        Raises:
          ValueError: a row is empty, or the model would have to read more of its tokens than its
            context has.
        """
        context = self.model.config.context_length
        for row in rows:
            if not 1 <= len(row) <= context + 1:
                raise ValueError(
                    f"A row of {len(row)} tokens reads {len(row) - 1} of them; the model's context "
                    f"has {context}. Cut it, or extend the context by rope_scaling (YaRN)"
                )
        scores: list[Any] = [None] * len(rows)
        dropped = 0.0
        # A row must split into whole chunks for each device along `context`.
        ways = 1 if self._mesh is None else self._mesh.shape["context"]
        step = 1 if ways == 1 else CHUNK * ways
        for bucketed, batch, numbers in self._batches([len(row) - 1 for row in rows]):
            width = -(-bucketed // step) * step
            tokens, targets, segments = np.zeros((3, batch, width), np.int32)
            for i, number in enumerate(numbers):
                n = len(rows[number]) - 1
                tokens[i, :n], targets[i, :n] = rows[number][:-1], rows[number][1:]
                segments[i, :n] = 1
            losses, margins, batch_dropped = self._on_mesh(tokens, targets, segments)
            dropped += float(batch_dropped)
            for i, number in enumerate(numbers):
                n = len(rows[number]) - 1
                scores[number] = RowScores(losses[i, :n], margins[i, :n])
        if dropped:
            logging.warning(
                "%d assignments of tokens to experts found no place (mesh.moe_buffer_factor), and "
                "count as zeros in these scores",
                dropped,
            )
        return scores

    def _on_mesh(self, *arrays):
        """The results of `_score` on the host, whose rows are split over the mesh if any."""
        score = _score(self.model.dtype)
        if self._mesh is None:
            scores = score(self._graph, None, self._params, *arrays)
        else:
            with jax.set_mesh(self._mesh):
                sharding = NamedSharding(self._mesh, BATCH)
                placed = [
                    jax.make_array_from_callback(x.shape, sharding, x.__getitem__) for x in arrays
                ]
                scores = score(self._graph, self._mesh, self._params, *placed)
        return tuple(np.asarray(x) for x in scores)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        seed: int = 0,
        **sampling: Any,
    ) -> list[list[int]]:
        """Continues each prompt, without speculation.

        Args:
          prompts: token lists, none empty.
          max_new_tokens: most tokens to add to each.
          stop: strings that end a continuation: it ends with the token that completes one, or
            before the token if the string is a special token.
          seed: PRNG seed for sampling, in [0, 2**32).
          sampling: fields of `Sampling`.

        Returns:
          The new tokens, including those of a stop string, but not a stop token.

        Raises:
          ValueError: as `Generation`.
        """
        new: list[list[int]] = [[] for _ in prompts]
        strings, tokens = split_stops(self.tokenizer, stop)
        for numbers, generation in self._generations(
            prompts,
            max_new_tokens=max_new_tokens,
            stop_tokens=tokens,
            seed=seed,
            speculative=False,
            **sampling,
        ):
            streams = [TextStream(self.tokenizer, strings) for _ in numbers]
            for item in generation:
                for row, (number, stream) in enumerate(zip(numbers, streams, strict=True)):
                    for token in item[row]:
                        if not stream.stopped:
                            new[number].append(token)
                            if strings:
                                stream.feed([token])
                    if stream.stopped:
                        generation.stop(row)
        return new

    def count_drafts(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, drafts: int
    ) -> tuple[Int[np.ndarray, " K"], Int[np.ndarray, " K"]]:
        """Continues prompts greedily, with K = `drafts` tokens drafted by the MTP module at a time.

        Args:
          prompts: token lists, none empty.
          max_new_tokens: most tokens to add to each.
          drafts: tokens drafted at a time.

        Returns:
          For each position in a draft, how many tokens were drafted and how many accepted.

        Raises:
          ValueError: as `Generation`.
        """
        drafted, accepted = np.zeros((2, drafts), np.int64)
        for _, generation in self._generations(
            prompts, max_new_tokens=max_new_tokens, speculative=drafts
        ):
            for _ in generation:
                pass
            drafted += generation.drafted
            accepted += generation.accepted
        return drafted, accepted

    def _generations(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        speculative: bool | int,
        stop_tokens: Sequence[int] = (),
        seed: int = 0,
        **sampling: Any,
    ) -> Iterator[tuple[list[int], Generation]]:
        """Yields indices of prompts, and the generation whose first rows continue them."""
        spare = 1 + speculative
        lengths = [len(prompt) + max_new_tokens + spare for prompt in prompts]
        for slots, batch, numbers in self._batches(lengths):
            filling = [[self.tokenizer.bos_id]] * (batch - len(numbers))
            generation = Generation(
                self.model,
                [*(prompts[number] for number in numbers), *filling],
                max_new_tokens=max_new_tokens,
                stop_tokens=(*self.tokenizer.stop_ids, *stop_tokens),
                slots=slots,
                speculative=speculative,
                # With one seed for all batches, each would repeat the draws of the one before.
                seed=int(np.random.SeedSequence((seed, numbers[0])).generate_state(1)[0]),
                **sampling,
            )
            for row in range(len(numbers), batch):
                generation.stop(row)
            yield numbers, generation

    def _batches(self, lengths: Sequence[int]) -> Iterator[tuple[int, int, list[int]]]:
        """Yields width, number of rows and row indices of each batch, longest rows first."""
        by_width: dict[int, list[int]] = {}
        for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            by_width.setdefault(bucket(lengths[number]), []).append(number)
        for width, numbers in by_width.items():
            size = self._batch_size or max(_TOKENS // width * self._ways, 1)
            if not self._batch_size:  # no large batch for a few rows
                size = min(size, 1 << (len(numbers) - 1).bit_length())
            size = -(-size // self._ways) * self._ways
            for start in unless_stopped(range(0, len(numbers), size), self._should_stop):
                yield width, size, numbers[start : start + size]


def bucket(length: int) -> int:
    """The least of 64, 96, 128, 192, 256, 384, ... that is no less than `length`."""
    power = max(_SHORTEST, 1 << max(length - 1, 0).bit_length())
    return power * 3 // 4 if power > _SHORTEST and length <= power * 3 // 4 else power


@functools.partial(forward_program, static_argnums=(0, 1))
def _score(graph, mesh, params, tokens, targets, segments):
    model = nnx.merge(graph, params)
    positions = default_positions(tokens.shape, segments)
    hidden, stats = model.hidden_states(tokens, segments, positions)
    dropped = jnp.zeros(()) if stats is None else stats.dropped.sum()
    scores = (*token_scores(hidden, model.head(), targets, chunk=_chunk(model)), dropped)
    if mesh is not None:  # replicated, since every process reads all of it
        whole = NamedSharding(mesh, PartitionSpec())
        scores = jax.lax.with_sharding_constraint(scores, whole)
    return scores


def _chunk(model: Qwen3Next) -> int:
    """Positions of a row whose logits are materialised at a time: about 32 MB."""
    return max(_SHORTEST, min(512, 2**23 // model.config.vocab_size))
