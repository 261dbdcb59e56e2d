r"""Trains a SentencePiece tokenizer on a source.

    python -m qwen3next_jax.data.train_tokenizer --source=jsonl --path='/corpus/*.jsonl.zst' \
        --vocab_size=32768 --output=tokenizer.model

It is the one that a run with `data.tokenizer=""` would train for itself: a lossless byte-pair
encoding, on evenly spaced documents of about 50 million characters. Records that would be held out
by `--holdout_fraction`, as a run's config has it, are not looked at.
"""

import argparse
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import sentencepiece
from etils import epath

from qwen3next_jax.command import check_writable, friendly_errors, write_atomic
from qwen3next_jax.data.documents import RecordTexts
from qwen3next_jax.data.files import is_local
from qwen3next_jax.data.holdout import split_source
from qwen3next_jax.data.sources import add_source_arguments, open_source
from qwen3next_jax.data.tokenizer import SentencePieceTokenizer

_RESERVED = "▅"  # SentencePiece skips training text that holds its mark for unknown pieces
_TRAINING_CHARACTERS = 50_000_000  # enough for any vocabulary; takes about 15 seconds
_SAMPLE = 1000  # documents from which the total length is estimated


@runtime_checkable
class Texts(Protocol):
    """Texts by number, such as a list."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> str: ...


def train_tokenizer(
    texts: Texts, path: str | os.PathLike, *, vocab_size: int
) -> SentencePieceTokenizer:
    """Trains a lossless byte-pair encoding on `texts` and writes it to `path`.

    The same texts give the same file. From long corpora, evenly spaced documents of about
    50 million characters are used. The file appears whole or not at all.

    Raises:
      ValueError: the texts are too small for `vocab_size`, or it is too small for the 256 bytes.
    """
    sample = range(0, len(texts), max(1, len(texts) // _SAMPLE))
    characters = sum(len(texts[i]) for i in sample) * len(texts) // max(1, len(sample))
    stride = -(-characters // _TRAINING_CHARACTERS) or 1
    unread: list[Exception] = []  # SentencePiece would replace it by an error of its own

    def chosen() -> Iterator[str]:
        try:
            for i in range(0, len(texts), stride):
                yield texts[i].replace(_RESERVED, " ")
        except Exception as error:
            unread.append(error)
            raise

    model = _Bytes()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=chosen(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            max_sentence_length=2**30,  # a whole document is one "sentence"
            # These make the encoding lossless.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            byte_fallback=True,
            # These suit source code.
            split_by_unicode_script=False,
            allow_whitespace_only_pieces=True,
            minloglevel=2,
        )
    except RuntimeError as error:
        if unread:
            raise unread[0] from None
        raise ValueError(_explain(str(error), vocab_size, len(texts))) from error
    write_atomic(epath.Path(path), model.content)
    return SentencePieceTokenizer(path)


class _Bytes:
    """A sink for the model that SentencePiece's trainer writes."""

    content = b""

    def write(self, content: bytes) -> None:
        self.content += content


def _explain(error: str, vocab_size: int, documents: int) -> str:
    if limit := re.search(r"too high .* value <= (\d+)", error):
        return (
            f"{documents} documents are too little text for a tokenizer of vocab_size={vocab_size}:"
            f" they yield {limit[1]} tokens; set model.vocab_size={limit[1]} or add documents"
        )
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
        return (
            f"vocab_size={vocab_size} is too small for the 256 bytes and the characters of these "
            f"documents; set model.vocab_size to {least[1]} or more"
        )
    if "sentences_.empty()" in error:
        return f"The {documents} documents hold no text to train a tokenizer on; add documents"
    return f"SentencePiece cannot train a tokenizer of vocab_size={vocab_size}: {error}"


def main(argv: list[str] | None = None) -> None:
    """Runs a command line."""
    parser = argparse.ArgumentParser(
        prog="python -m qwen3next_jax.data.train_tokenizer",
        description=(__doc__ or "").partition("\n")[0],
    )
    add_source_arguments(parser)
    parser.add_argument(
        "--holdout_fraction",
        type=float,
        default=0.0,
        help="as the run's config has it, to leave out what it holds out; %(default)g if not given",
    )
    parser.add_argument("--vocab_size", type=int, required=True)
    parser.add_argument("--output", required=True, help="a file")
    args = parser.parse_args(argv)
    with friendly_errors():
        if args.output.endswith("/"):
            raise ValueError(f"--output={args.output} names a directory; name a file inside it")
        if is_local(epath.Path(args.output)):  # training takes long, and would be lost
            check_writable(pathlib.Path(args.output))
        records = open_source(
            args.source, args.path, field=args.field, split=args.split, on_error=args.on_error
        )
        kept = split_source(records, args.holdout_fraction)[0] if args.holdout_fraction else records
        texts = RecordTexts(kept, on_error=args.on_error)
        tokenizer = train_tokenizer(texts, args.output, vocab_size=args.vocab_size)
    print(f"{args.output}: {tokenizer.vocab_size} tokens, from {len(texts)} records")


if __name__ == "__main__":
    main()
