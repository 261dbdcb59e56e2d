"""What a run trains on and is evaluated on: sources, held-out records, and the tokenizer.

`load_data` opens what a config names. A run that goes on must find the same records and the same
tokenizer, or its order, its ids and what it holds out would be others (`check_same_data`).
"""

import dataclasses
import functools
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging
from etils import epath

from qwen3next_jax.data.documents import (
    BadRecordError,
    RecordTexts,
    readable,
    text_in_loss,
    tokenized,
)
from qwen3next_jax.data.hashing import hash64
from qwen3next_jax.data.holdout import split_source
from qwen3next_jax.data.prepared import check_prepared, prepared_source
from qwen3next_jax.data.sources import Chained, Records, open_source
from qwen3next_jax.data.tokenizer import Tokenizer, check_vocabulary, fingerprint, load_tokenizer
from qwen3next_jax.data.train_tokenizer import train_tokenizer

_LOOKED_AT = 100  # how many of a part's first records are tried until one can be used


@dataclasses.dataclass(frozen=True)
class TrainingPart:
    """One source of a mixture.

    Attributes:
      name: in metrics.
      records: to train on.
      weight: share of the tokens, relative to the other parts'.
      fingerprint: number of records, held-out ones included, and a hash of the files that hold
        them.
    """

    name: str
    records: Records
    weight: float = 1.0
    fingerprint: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What a run trains on and is evaluated on, and how it becomes rows.

    Attributes:
      train: the parts of the mixture, one where there is one source.
      held_out: the held-out records of all parts.
      tokenizer: of the run.
      num_shards: S, the number of virtual shards (`shard.py`).
      packing: "concatenate" or "best_fit".
      too_long: with best_fit, for documents longer than a row: "error" treats them as records that
        cannot be used, "truncate" keeps their first T tokens and counts them.
      on_error: for records that cannot be used: "raise", or "skip" and count them.
      window_rows: how many rows are packed and shuffled together.
      skipped_files: how many files could not be opened.
    """

    train: Sequence[TrainingPart]
    held_out: Records
    tokenizer: Tokenizer
    num_shards: int = 1
    packing: str = "concatenate"
    too_long: str = "error"
    on_error: str = "raise"
    window_rows: int = 128
    skipped_files: int = 0

    def fingerprint(self) -> dict[str, Any]:
        """Identifies the data, as JSON: it must be equal when a run resumes (`check_same_data`).

        Returns:
          "records": each part's `TrainingPart.fingerprint` by name; "tokenizer": the tokenizer's
          fingerprint, which reads its file.
        """
        records = {part.name: list(part.fingerprint) for part in self.train}
        return {"records": records, "tokenizer": fingerprint(self.tokenizer)}

    def ends(self) -> list[int]:
        """Special tokens that end the loss's tokens in the first usable document of each part.

        They are EOS or, for chats, the token with which the template ends an answer.
        """
        ends = []
        known = {*self.tokenizer.special_ids, *self.tokenizer.stop_ids}
        for part in self.train:
            for i in range(min(len(part.records), _LOOKED_AT)):
                try:
                    document = tokenized(part.records[i], self.tokenizer)
                except BadRecordError:
                    continue
                in_loss = document["targets"][document["loss_weights"] > 0].tolist()
                # A template's marks may include the line end after the end-of-turn token.
                while in_loss and self.tokenizer.decode(in_loss[-1:]).isspace():
                    in_loss.pop()
                if in_loss and in_loss[-1] in known:
                    ends.append(in_loss[-1])
                elif in_loss:
                    logging.warning(
                        "What is learnt of %s ends with %r, which is no special token of %s: texts "
                        "will not know where to end; take a chat template of this tokenizer's own",
                        part.records[i].name,
                        self.tokenizer.decode(in_loss[-8:]),
                        self.tokenizer.path,
                    )
                break
        return list(dict.fromkeys(ends))

    @property
    def held_out_parts(self) -> dict[str, Records]:
        """The held-out records of each part of the mixture, by its name."""
        if not isinstance(self.held_out, Chained):
            return {"held out": self.held_out}
        names = [part.name for part in self.train]
        return dict(zip(names, self.held_out.sequences, strict=True))

    @property
    def held_out_bytes(self) -> int:
        """Size of the held-out texts in UTF-8, the denominator of bits per byte.

        Raises:
          ValueError: none of the records can be used.
        """
        return self._held_out_sizes[0]

    @property
    def gzip_bits_per_byte(self) -> float:
        """Bits per byte of the concatenated held-out texts under gzip -9, a baseline."""
        plain, compressed = self._held_out_sizes
        return 8 * compressed / plain

    @functools.cached_property
    def _held_out_sizes(self) -> tuple[int, int]:
        """Size of the held-out texts in bytes, plain and compressed, in one pass over them."""
        gzip, plain, compressed = zlib.compressobj(level=9, wbits=31), 0, 0
        for record, document in readable(self.held_out, self.tokenizer, on_error=self.on_error):
            text = text_in_loss(record, document, self.tokenizer).encode()
            plain += len(text)
            compressed += len(gzip.compress(text))
        if not plain:
            raise ValueError(
                f"None of the {len(self.held_out)} held-out records has text to predict; mend the "
                "records or raise data.holdout_fraction"
            )
        return plain, compressed + len(gzip.flush())


def load_data(
    *,
    source: str,
    path: str = "",
    field: str = "text",
    split: str = "train",
    mixture: Mapping[str, Mapping[str, Any]] | None = None,
    tokenizer: str = "",
    chat_template: str = "",
    holdout_fraction: float,
    on_error: str = "raise",
    vocab_size: int,
    trained_tokenizer: str | os.PathLike,
    given_weights: str = "",
    **rows: Any,
) -> Data:
    """Opens the sources and the tokenizer; trains a tokenizer on the training part if needed.

    The arguments up to `on_error`, and `rows`, are a config's `data` section:
    `load_data(**dataclasses.asdict(config.data), vocab_size=..., trained_tokenizer=...)`.

    Args:
      source, path, field, split, on_error: see `open_source`.
      mixture: several sources instead of one, by name: for each its `weight` and whichever of
        `source`, `path`, `field` and `split` differ from the arguments of that name.
      tokenizer, chat_template: arguments of `load_tokenizer`; tokenizer "" means the tokenizer of
        prepared data, or else `trained_tokenizer`.
      holdout_fraction: share of the records held out.
      vocab_size: the model's vocabulary, an upper limit on the tokenizer's.
      trained_tokenizer: path of the run's own tokenizer, which is trained if the file is missing.
      given_weights: the checkpoint that a run begins with, or "". With one, training a tokenizer is
        refused, because the weights belong to the checkpoint's vocabulary.
      rows: `num_shards`, `packing`, `too_long`, `window_rows`, as `Data` has them.

    Raises:
      ValueError: says what is wrong with the sources or with the tokenizer.
      FileNotFoundError: there is no file `tokenizer`.
    """
    given: dict[str, Any] = {"source": source, "path": path, "field": field, "split": split}
    # A part's name decides the order of its records, and prepared data keep their source's.
    alone = prepared_source(path) if source == "prepared" else source
    parts = mixture or {alone: {"weight": 1.0}}
    train, held_out, skipped_files = [], [], 0
    for name, part in parts.items():
        opened = open_source(
            **{**given, **{k: v for k, v in part.items() if k != "weight"}}, on_error=on_error
        )
        skipped_files += len(opened.skipped_files)
        kept, out = split_source(opened, holdout_fraction)
        lengths = [[file.name, len(file)] for file in opened.files]
        part_fingerprint = (len(opened), f"{hash64(json.dumps(lengths)):016x}")
        train.append(TrainingPart(name, kept, float(part["weight"]), part_fingerprint))
        held_out.append(out)

    prepared = [
        p.get("path", path) for p in parts.values() if p.get("source", source) == "prepared"
    ]
    if prepared:
        tokenizer = tokenizer or prepared[0]
    if given_weights and not tokenizer:
        raise ValueError(
            f"The weights of train.initial_checkpoint={given_weights!r} have a vocabulary of their "
            "own, and data.tokenizer='' would train another; give theirs, as "
            f"--config.data.tokenizer={given_weights}"
        )
    if not tokenizer and not epath.Path(trained_tokenizer).exists():
        logging.info("Training a tokenizer of %d tokens: %s", vocab_size, trained_tokenizer)
        texts = RecordTexts(Chained([part.records for part in train]), on_error=on_error)
        train_tokenizer(texts, trained_tokenizer, vocab_size=vocab_size)
    loaded = load_tokenizer(tokenizer or trained_tokenizer, chat_template=chat_template)
    check_vocabulary(loaded, vocab_size)
    for directory in prepared:
        check_prepared(directory, loaded)
    return Data(
        train=train,
        held_out=Chained(held_out),
        tokenizer=loaded,
        on_error=on_error,
        skipped_files=skipped_files,
        **rows,
    )


def changed_records(data: Data, began_with: Mapping[str, Any]) -> dict[str, str]:
    """A line for each part of the data whose records are not those that a run began with.

    Args:
      data, began_with: arguments of `check_same_data`.
    """
    records, changed = began_with.get("records", {}), {}
    for part in data.train:
        now = list(part.fingerprint)
        then = records.get(part.name, now)
        if then != now:
            changed[part.name] = f"{part.name}: {then[0]} records then, {now[0]} now" + (
                ", in other files" if then[0] == now[0] else ""
            )
    return changed


def check_same_data(data: Data, began_with: Mapping[str, Any]) -> None:
    """Refuses to go on with other records or another tokenizer than a run began with.

    Args:
      data: the run's current data.
      began_with: `Data.fingerprint()` stored in the checkpoint; keys that an old checkpoint lacks
        are not compared.

    Raises:
      ValueError: says what changed.
    """
    tokenizer = began_with.get("tokenizer", {})
    changed = list(changed_records(data, began_with).values())
    parts = [part.name for part in data.train]
    if (then := list(began_with.get("records", parts))) != parts:  # positions are kept in order
        changed.append(f"the parts: {', '.join(then)} then, {', '.join(parts)} now, in this order")
    changed += [
        f"the tokenizer's {key}: {tokenizer[key]} then, {now} now, of {data.tokenizer.path}"
        for key, now in fingerprint(data.tokenizer).items()
        if key in tokenizer and tokenizer[key] != now
    ]
    if changed:
        raise ValueError(
            "The data is not what the run began with: its order, its ids or what is held out would "
            "be others. Restore it, or begin another run in another --workdir, with these weights "
            "by --config.train.initial_checkpoint:\n  " + "\n  ".join(changed)
        )
