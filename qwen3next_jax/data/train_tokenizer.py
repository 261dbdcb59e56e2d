r"""Trains a SentencePiece tokenizer on a source.

    python -m qwen3next_jax.data.train_tokenizer --source=jsonl --path='/corpus/*.jsonl.zst' \
        --vocab_size=32768 --output=tokenizer.model

It is the one that a run with `data.tokenizer=""` would train for itself: a lossless byte-pair
encoding, on evenly spaced documents of about 50 million characters. Records that would be held out
by `--holdout_fraction`, as a run's config has it, are not looked at.
"""

import argparse
import pathlib

from etils import epath

from qwen3next_jax.command import check_writable, friendly_errors
from qwen3next_jax.data.documents import RecordTexts
from qwen3next_jax.data.files import is_local
from qwen3next_jax.data.holdout import split_source
from qwen3next_jax.data.sources import add_source_arguments, open_source
from qwen3next_jax.data.tokenizer import train_tokenizer


def main(argv: list[str] | None = None) -> None:
    """Runs a command line."""
    parser = argparse.ArgumentParser(
        prog="python -m qwen3next_jax.data.train_tokenizer",
        description=(__doc__ or "").partition("\n")[0],
    )
    add_source_arguments(parser)
    parser.add_argument("--holdout_fraction", type=float, default=0.0, help="as in the config")
    parser.add_argument("--vocab_size", type=int, required=True)
    parser.add_argument("--output", required=True, help="a file")
    args = parser.parse_args(argv)
    with friendly_errors():
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
