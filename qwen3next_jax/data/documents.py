"""Records to tokenised documents: inputs, targets and loss weights.

A tokenised document is a dict of arrays [n]: `tokens`, the model's input, and `targets`, int32, and
`loss_weights`, float32. A text becomes BOS, its ids, EOS: `tokens` are all of these but the last
one, `targets` all but the first one, so that each token after BOS is a target once.
"""

from collections.abc import Iterator, Mapping

import numpy as np
from absl import logging
from jaxtyping import Float32, Int32

from qwen3next_jax.data.chat_document import chat_document
from qwen3next_jax.data.sources import BadRecordError, Record, Records
from qwen3next_jax.data.tokenizer import Tokenizer, check_text

# The arrays of a document have one length, which differs between documents, hence " _".
Document = Mapping[str, Int32[np.ndarray, " _"] | Float32[np.ndarray, " _"]]


def tokenized(record: Record, tokenizer: Tokenizer) -> Document:
    """The document of a record; raises BadRecordError if it is empty or cannot be tokenised."""
    if record.tokens is not None:
        return record.tokens
    if record.messages is not None:
        chat = {
            "messages": record.messages,
            "tools": record.tools,
            "chat_template_kwargs": record.chat_template_kwargs,
        }
        template = tokenizer.chat_template  # outside of `try`: without one, no chat can be used
        try:
            return chat_document(chat, tokenizer, template)
        except ValueError as error:
            raise BadRecordError(f"{record.name}: {error}") from error
    if not record.text:
        raise BadRecordError(f"{record.name}: is an empty document")
    try:
        ids = tokenizer.encode(record.text)
    except ValueError as error:
        raise BadRecordError(f"{record.name}: {error}") from error
    return next_token_pairs(ids, bos=tokenizer.bos_id, eos=tokenizer.eos_id)


def readable(
    records: Records, tokenizer: Tokenizer, *, on_error: str
) -> Iterator[tuple[Record, Document]]:
    """Yields each record with its document, in order.

    With `on_error="skip"`, records that cannot be used are left out, and their number is logged.

    Raises:
      BadRecordError: a record cannot be used, with any other `on_error`.
    """
    skipped = 0
    for i in range(len(records)):
        try:
            record = records[i]
            document = tokenized(record, tokenizer)
        except BadRecordError as error:
            if on_error != "skip":
                raise
            log_skipped(error)
            skipped += 1
        else:
            yield record, document
    if skipped:
        logging.warning("Skipped %d of %d records to evaluate on", skipped, len(records))


def text_in_loss(record: Record, document: Document, tokenizer: Tokenizer) -> str:
    """The text in a document's loss: the record's text, or a chat's decoded targets."""
    if record.text is not None:
        return record.text
    return tokenizer.decode(document["targets"][document["loss_weights"] > 0].tolist())


def log_skipped(error: BadRecordError) -> None:
    """Logs the first few records that a process skips."""
    logging.log_first_n(logging.WARNING, "Skipped %s", 5, error)


class RecordTexts:
    """The text of each record, to train a tokenizer on; "" for records that are skipped."""

    def __init__(self, records: Records, *, on_error: str):
        self._records, self._on_error = records, on_error

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> str:
        try:
            return self._text(self._records[index])
        except BadRecordError:
            if self._on_error != "skip":
                raise
            return ""

    def _text(self, record: Record) -> str:
        if record.tokens is not None:
            raise ValueError(
                f"{record.name} is tokenised already; give the tokenizer it was prepared with as "
                "data.tokenizer"
            )
        if record.messages is not None:
            contents = (message.get("content") for message in record.messages)
            text = "\n".join(content for content in contents if isinstance(content, str))
        else:
            text = record.text or ""
        try:
            check_text(text)
        except ValueError as error:
            raise BadRecordError(f"{record.name}: {error}") from error
        return text


def next_token_pairs(ids: list[int], *, bos: int, eos: int) -> Document:
    """The document of one text, of len(ids) + 1 tokens, with every weight 1."""
    delimited = np.array([bos, *ids, eos], np.int32)
    weights = np.ones(len(ids) + 1, np.float32)
    return {"tokens": delimited[:-1], "targets": delimited[1:], "loss_weights": weights}
