"""Text to token ids and back with SentencePiece, without losing a character.

What a model's bits per byte mean depends on every byte being predicted, so the tokenizers trained
here change nothing: no Unicode normalisation, no space put before the text, no run of spaces
shortened, and bytes for whatever has no piece. Pieces stay between the spaces, but may span letters
and punctuation (`self.`, `):` with its line end), and a run of spaces, an indentation, can be one.

One trap is left. SentencePiece writes a space as "▁" (U+2581) and turns every such piece back into
a space, so `encode` hands over a "▁" of the text itself as its three bytes.
"""

import os
import re
from collections.abc import Iterable, Sequence

import sentencepiece
from etils import epath

_SPACE = "▁"
_RESERVED = "▅"  # SentencePiece skips training text that holds its mark for unknown pieces
_TRAINING_CHARACTERS = 50_000_000  # enough for any vocabulary; takes about 15 seconds


class SentencePieceTokenizer:
    """A SentencePiece model, read from `path`.

    With a model made by `train_tokenizer`, `decode(encode(text)) == text` for all text. Others may
    normalise.

    Raises:
      ValueError: the file is no SentencePiece model, or it lacks a BOS or an EOS token.
    """

    def __init__(self, path: str | os.PathLike):
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.load_from_serialized_proto(epath.Path(path).read_bytes())
        except RuntimeError as error:
            raise ValueError(f"{path} is not a SentencePiece model") from error
        self.bos_id: int = self._pieces.bos_id()
        self.eos_id: int = self._pieces.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(
                f"{path} has bos_id={self.bos_id} and eos_id={self.eos_id}, but documents are "
                "delimited by both; use a model with both, or data.tokenizer='' to train one"
            )
        bytes_of_space = [self._pieces.piece_to_id(f"<0x{b:02X}>") for b in _SPACE.encode()]
        has_bytes = all(map(self._pieces.is_byte, bytes_of_space))
        self._literal_space = bytes_of_space if has_bytes else self._pieces.encode(_SPACE)

    @property
    def vocab_size(self) -> int:
        """Number of pieces; ids are below it."""
        return self._pieces.vocab_size()

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, with neither BOS nor EOS."""
        first, *rest = text.split(_SPACE)
        ids = self._pieces.encode(first)
        for part in rest:
            ids += self._literal_space + self._pieces.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; nothing for BOS and EOS.

        An id that only the model knows, whose vocabulary may be the larger one, becomes " ⁇ ".
        """
        unknown = self._pieces.unk_id()
        return self._pieces.decode([int(i) if i < self.vocab_size else unknown for i in ids])


def train_tokenizer(
    texts: Sequence[str], path: str | os.PathLike, *, vocab_size: int
) -> SentencePieceTokenizer:
    """Trains a lossless byte-pair encoding on `texts` and writes it to `path`.

    The same texts give the same file. Of long corpora evenly spaced documents are used, about
    50 million characters. The file appears whole or not at all.

    Raises:
      ValueError: the texts are too small for `vocab_size`, or it is too small for the 256 bytes.
    """
    stride = -(-sum(map(len, texts)) // _TRAINING_CHARACTERS) or 1
    model = _Bytes()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(text.replace(_RESERVED, " ") for text in texts[::stride]),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            max_sentence_length=2**30,  # a whole document is one "sentence"
            # Nothing is lost.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            byte_fallback=True,
            # What suits source code.
            split_by_unicode_script=False,
            allow_whitespace_only_pieces=True,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(_explain(str(error), vocab_size, len(texts))) from error
    finished = epath.Path(path)
    finished.parent.mkdir(parents=True, exist_ok=True)
    unfinished = finished.parent / f".{finished.name}.{os.getpid()}"
    unfinished.write_bytes(model.content)
    unfinished.replace(finished)
    return SentencePieceTokenizer(path)


def check_vocabulary(tokenizer: SentencePieceTokenizer, vocab_size: int) -> None:
    """Refuses a tokenizer with ids that a model of `vocab_size` tokens lacks."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"The tokenizer has {tokenizer.vocab_size} tokens but model.vocab_size={vocab_size}; "
            f"set model.vocab_size to {tokenizer.vocab_size} or more, or choose another tokenizer"
        )


class _Bytes:
    """What the trainer writes to."""

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
