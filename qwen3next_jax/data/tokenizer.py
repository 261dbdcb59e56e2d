"""Text to token ids and back: SentencePiece for models trained here, `tokenizer.json` for others.

`load_tokenizer` finds either in a directory. Both classes have the same interface. Special tokens
are not parsed by default: "<|im_end|>" in a document stands for its ten characters. Rendered chats
are encoded with `parse_special=True`, which makes it the token of that name.

Bits per byte are meaningful only if every byte is predicted, so the tokenizers trained here are
lossless: no Unicode normalisation, no space put before the text, no run of spaces shortened, and
bytes for characters without a piece. Pieces end at spaces, but may span letters and punctuation
(`self.`, or `):` with its line end), and a run of spaces, such as an indentation, can be a piece.

One trap remains: SentencePiece represents a space as "▁" (U+2581) and decodes every "▁" to a space,
so `encode` encodes a literal "▁" of the text as its three bytes.
"""

import bisect
import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import sentencepiece
import tokenizers
from etils import epath

from qwen3next_jax.command import write_atomic
from qwen3next_jax.config import read_json
from qwen3next_jax.data.chat import load_chat_template

_SPACE = "▁"


def load_tokenizer(
    path: str | os.PathLike, *, chat_template: str | os.PathLike = ""
) -> "Tokenizer":
    """The tokenizer of a file or of a directory.

    Args:
      path: a `tokenizer.json`, a SentencePiece model of any other name, or a directory: a Hugging
        Face model, a work directory of ours, one of its step folders, or prepared data; or "bytes",
        whose ids are the 256 bytes of UTF-8, BOS 256 and EOS 257.
      chat_template: a file that replaces the one beside the tokenizer.

    In a directory the tokenizer is, in this order: `tokenizer.json`, `tokenizer.model`, the one
    that `data.tokenizer` of our run's `config.json` names.

    Raises:
      FileNotFoundError: there is nothing of this kind at `path`.
      ValueError: the file is of another kind, or says too little; see the two classes.
    """
    file = _tokenizer_file(path)
    if not file.exists():
        raise FileNotFoundError(
            f"{file} does not exist; expected {_EXPECTED}, a directory, or 'bytes'"
        )
    tokenizer: Tokenizer = (
        HuggingFaceTokenizer(file) if file.suffix == ".json" else SentencePieceTokenizer(file)
    )
    if chat_template:
        if not (template := epath.Path(chat_template)).exists():
            raise FileNotFoundError(f"The chat template {chat_template} does not exist")
        tokenizer.chat_template = template.read_text()
    return tokenizer


_EXPECTED = "a SentencePiece model or a tokenizer.json"
_BYTES = epath.Path(__file__).parent / "bytes_tokenizer"


def _tokenizer_file(path: str | os.PathLike) -> epath.Path:
    """The file itself, the built-in one for "bytes", or the tokenizer file of a directory."""
    # "bytes" is a tokenizer.json like any other, so that it is copied along with a run.
    file = _BYTES if path == "bytes" else epath.Path(path)
    return _file_within(file) if file.is_dir() else file


def _file_within(directory: epath.Path) -> epath.Path:
    run = directory
    if directory.name.isdigit() and directory.parent.name == "checkpoints":
        run = directory.parent.parent  # a step folder
    for name in ("tokenizer.json", "tokenizer.model"):
        if (run / name).exists():
            return run / name
    named = read_json(run / "config.json").get("data", {}).get("tokenizer")
    if named:  # a run started from Python keeps no copy of its tokenizer
        return _tokenizer_file(named)
    raise FileNotFoundError(f"{run} holds no tokenizer; expected tokenizer.json or tokenizer.model")


class SentencePieceTokenizer:
    """A SentencePiece model, read from `path`.

    It has the attributes of `HuggingFaceTokenizer`.

    With a model made by `train_tokenizer`, `decode(encode(text)) == text` for all text. Others may
    normalise.

    Raises:
      ValueError: the file is no SentencePiece model, or it lacks a BOS or an EOS token.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = epath.Path(path)
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.load_from_serialized_proto(self.path.read_bytes())
        except RuntimeError as error:
            raise ValueError(
                f"{path} is not a SentencePiece model; expected {_EXPECTED}"
            ) from error
        self.vocab_size: int = self._pieces.vocab_size()
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
        self.stop_ids: tuple[int, ...] = (self.eos_id,)
        self.adds_bos = True  # our documents are delimited by it
        self.special_tokens: dict[str, str] = {
            "bos_token": self._pieces.id_to_piece(self.bos_id),
            "eos_token": self._pieces.id_to_piece(self.eos_id),
        }

    @functools.cached_property
    def chat_template(self) -> str:
        """Jinja; `load_chat_template` finds it beside the file, or raises."""
        return load_chat_template(self.path.parent)

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """The ids of `text`; neither BOS nor EOS is added.

        Args:
          text: any text.
          parse_special: whether "<s>" in the text is the token of that name, not three characters.

        Raises:
          ValueError: see `check_text`.
        """
        check_text(text)
        if not parse_special:
            return self._encode_text(text)
        ids = []
        for part in re.split("(" + "|".join(map(re.escape, self._control)) + ")", text):
            ids += [self._control[part]] if part in self._control else self._encode_text(part)
        return ids

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """The tokens that stand for no text, BOS and EOS among them."""
        return frozenset(self._control.values())

    @functools.cached_property
    def _control(self) -> dict[str, int]:
        ids = filter(self._pieces.is_control, range(self.vocab_size))
        return {self._pieces.id_to_piece(i): i for i in ids}

    def encode_with_starts(
        self, text: str, *, parse_special: bool = False
    ) -> tuple[list[int], list[int]]:
        """The ids that `encode` returns, and the index in `text` at which each token begins.

        Raises:
          ValueError: the model changes text, so that its pieces are not parts of it.
        """
        ids = self.encode(text, parse_special=parse_special)
        lengths = [1 if self._pieces.is_byte(i) else len(self._piece_bytes(i)) for i in ids]
        ends = list(itertools.accumulate(lengths))
        characters = list(itertools.accumulate(len(c.encode()) for c in text))
        if ids and ends[-1] != characters[-1]:
            raise ValueError(
                "This SentencePiece model normalises text, so that its tokens cannot be found in "
                "it again; use the tokenizer.json of the same model"
            )
        return ids, [bisect.bisect_right(characters, start) for start in [0, *ends[:-1]]]

    def _piece_bytes(self, token: int) -> bytes:
        return self._pieces.id_to_piece(token).replace(_SPACE, " ").encode()

    def _encode_text(self, text: str) -> list[int]:
        first, *rest = text.split(_SPACE)
        ids = self._pieces.encode(first)
        for part in rest:
            ids += self._literal_space + self._pieces.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; BOS and EOS become nothing.

        An id outside of this vocabulary, which the model's may exceed, becomes " ⁇ ".
        """
        unknown = self._pieces.unk_id()
        return self._pieces.decode([int(i) if i < self.vocab_size else unknown for i in ids])


class HuggingFaceTokenizer:
    """A `tokenizer.json`, read from `path`, and the special tokens named by files beside it.

    `tokenizer.json` does not say which tokens begin and end a document. They are the first that
    these files name, in this order: `tokenizer_config.json` (`bos_token`, `eos_token`),
    `generation_config.json` and `config.json` (`bos_token_id`, `eos_token_id`; of several EOS the
    first). So it is "<|endoftext|>" 151643 and "<|im_end|>" 151645 for an instruction-tuned Qwen.
    Where no file names a BOS, EOS separates documents and serves as both.

    Attributes:
      path: the file.
      vocab_size: number of ids, added tokens included; a model's vocabulary may be larger.
      bos_id, eos_id: the two tokens.
      named_ends: tokens that end a text by `generation_config.json` or, where that does not exist,
        by `config.json`.
      stop_ids: all tokens that end a text: EOS, and `named_ends`.
      adds_bos: whether a prompt begins with BOS (`add_bos_token`); not so for Qwen.
      special_tokens: texts by name of the tokens in `tokenizer_config.json`, for templates.

    Raises:
      ValueError: the file is no `tokenizer.json`, or no EOS is named, or one that it lacks.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = epath.Path(path)
        content = self.path.read_bytes()
        try:
            self._parsing = tokenizers.Tokenizer.from_buffer(content)
            self._literal = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(f"{path} is not a tokenizer.json: {error}") from error
        # This is state of the whole tokenizer; having two makes sharing between threads safe.
        self._literal.encode_special_tokens = True
        for tokenizer in (self._parsing, self._literal):
            tokenizer.no_truncation()
            tokenizer.no_padding()
            tokenizer.post_processor = None  # it adds BOS and EOS, and shortens offsets

        folder = self.path.parent
        config = read_json(folder / "tokenizer_config.json")
        ids = [read_json(folder / name) for name in ("generation_config.json", "config.json")]
        ids[1] = ids[1].get("model", ids[1])  # a work directory's config.json has sections,
        ids[1] = {**ids[1], **ids[1].get("extra", {})}  # and keeps these keys in `extra`
        extra = config.get("extra_special_tokens")
        named = {**extra} if isinstance(extra, Mapping) else {}  # a list names none
        named |= {name: config.get(name) for name in _SPECIAL}
        self.special_tokens: dict[str, str] = {
            name: token["content"] if isinstance(token, Mapping) else token
            for name, token in named.items()
            if token is not None
        }
        self.vocab_size: int = 1 + max(self._parsing.get_vocab().values())
        eos = self._named("eos", ids)
        if eos is None:
            raise ValueError(
                f"No file beside {path} names the EOS token; expected tokenizer_config.json with "
                "eos_token, or generation_config.json or config.json with eos_token_id"
            )
        bos = self._named("bos", ids)
        self.eos_id: int = eos
        self.bos_id: int = eos if bos is None else bos
        self.adds_bos: bool = bool(config.get("add_bos_token"))
        generation = ids[0] if (folder / "generation_config.json").exists() else ids[1]
        ends = [i for i in _token_ids(generation, "eos_token_id") if 0 <= i < self.vocab_size]
        self.named_ends: tuple[int, ...] = tuple(ends)  # what other engines stop at
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys([eos, *ends]))

    def names_delimiters(self) -> bool:
        """Whether `tokenizer_config.json` alone says what EOS and BOS are."""
        wanted = {"eos_token"} | ({"bos_token"} if self.bos_id != self.eos_id else set())
        return wanted <= self.special_tokens.keys()

    def delimiters(self) -> dict[str, str | None]:
        """The texts of EOS and BOS, under their names in `tokenizer_config.json`."""
        ids = {"eos_token": self.eos_id, "bos_token": self.bos_id}
        return {name: self._parsing.id_to_token(i) for name, i in ids.items()}

    def _named(self, which: str, ids: Iterable[Mapping[str, Any]]) -> int | None:
        token = self.special_tokens.get(f"{which}_token")
        if token is not None:
            found = self._parsing.token_to_id(token)
            if found is None:
                raise ValueError(
                    f"{self.path} lacks the {which}_token {token!r} that tokenizer_config.json "
                    "beside it names"
                )
            return found
        key = f"{which}_token_id"
        named = [i for given in ids for i in _token_ids(given, key)]
        known = [i for i in named if 0 <= i < self.vocab_size]
        if named and not known:
            raise ValueError(
                f"{self.path} lacks the {key}={named[0]} that a file beside it names: its ids lie "
                f"in [0, {self.vocab_size}); name the {which}_token in tokenizer_config.json"
            )
        return known[0] if known else None

    @functools.cached_property
    def chat_template(self) -> str:
        """Jinja, as `load_chat_template` finds it beside the file, or raises."""
        return load_chat_template(self.path.parent)

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """The ids of `text`; neither BOS nor EOS is added.

        Args:
          text: any text.
          parse_special: whether "<|im_end|>" in the text is the token of that name, not its
            characters. Added tokens that are not special, such as Qwen's "<think>", always are.

        Raises:
          ValueError: see `check_text`.
        """
        return self._encoding(text, parse_special).ids

    def encode_with_starts(
        self, text: str, *, parse_special: bool = False
    ) -> tuple[list[int], list[int]]:
        """The ids that `encode` returns, and the index in `text` at which each token begins."""
        encoding = self._encoding(text, parse_special)
        return encoding.ids, [start for start, _ in encoding.offsets]

    def _encoding(self, text: str, parse_special: bool) -> tokenizers.Encoding:
        check_text(text)
        tokenizer = self._parsing if parse_special else self._literal
        return tokenizer.encode(text, add_special_tokens=False)

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """The tokens that stand for no text, BOS and EOS among them."""
        added = self._parsing.get_added_tokens_decoder().items()
        return frozenset(i for i, token in added if token.special)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens and ids outside of this vocabulary become nothing."""
        return self._parsing.decode([int(i) for i in ids], skip_special_tokens=True)


Tokenizer = SentencePieceTokenizer | HuggingFaceTokenizer

_SPECIAL = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip


def fingerprint(tokenizer: Tokenizer) -> dict[str, Any]:
    """Everything that decides a document's ids, as JSON; equal tokenizers have equal ones."""
    return {
        "sha256": hashlib.sha256(tokenizer.path.read_bytes()).hexdigest(),
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
    }


def keep_tokenizer(
    tokenizer: Tokenizer, directory: str | os.PathLike, *, ends: Iterable[int] = ()
) -> None:
    """Copies a tokenizer, its chat template and the files beside it that describe its tokens.

    The directory is a run's or holds prepared data. Each file appears whole or not at all.

    Args:
      tokenizer: the tokenizer to copy.
      directory: the destination.
      ends: tokens that a run teaches its model to end with. Beside a `tokenizer.json`,
        `generation_config.json` then names those too that the model's files lack, so that texts
        end there, here and in other engines.

    Raises:
      ValueError: the directory holds another tokenizer or another chat template.
    """
    folder = epath.Path(directory)
    kind = "tokenizer.json" if isinstance(tokenizer, HuggingFaceTokenizer) else "tokenizer.model"
    contents = {kind: tokenizer.path.read_bytes()}
    for name in BESIDE:
        if (file := tokenizer.path.parent / name).exists():
            contents[name] = file.read_bytes()
    # There may be no template, or several without a default; plain text needs none.
    with contextlib.suppress(FileNotFoundError, ValueError):
        contents["chat_template.jinja"] = tokenizer.chat_template.encode()
    if isinstance(tokenizer, HuggingFaceTokenizer) and not tokenizer.names_delimiters():
        # The model's config.json named them, and it is not copied.
        config = json.loads(contents.get("tokenizer_config.json", b"{}"))
        contents["tokenizer_config.json"] = json.dumps(
            {**config, **tokenizer.delimiters()}, indent=2, ensure_ascii=False
        ).encode()
    ends = list(ends)
    if isinstance(tokenizer, HuggingFaceTokenizer) and not set(ends) <= set(tokenizer.named_ends):
        generation = json.loads(contents.get("generation_config.json", b"{}"))
        generation["eos_token_id"] = list(dict.fromkeys([*tokenizer.stop_ids, *ends]))
        contents["generation_config.json"] = json.dumps(generation, indent=2).encode()
    for name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja"):
        if (file := folder / name).exists() and file.read_bytes() != contents.get(name):
            raise ValueError(
                f"{file} is another than that of {tokenizer.path}, and what is in {folder} was "
                "made with it; choose another directory, or remove it"
            )
    for name, content in contents.items():
        if not (folder / name).exists() or (folder / name).read_bytes() != content:
            write_atomic(folder / name, content)


BESIDE = (
    "tokenizer_config.json", "generation_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt",
)  # fmt: skip
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "chat_template.jinja", *BESIDE)


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a text to continue, at least one.

    They begin with BOS where the model was trained on texts that do (`tokenizer.adds_bos`), and an
    empty text is BOS alone: the start of a document.
    """
    ids = tokenizer.encode(text)
    return [tokenizer.bos_id, *ids] if tokenizer.adds_bos or not ids else ids


def split_stops(tokenizer: Tokenizer, stop: Iterable[str]) -> tuple[list[str], list[int]]:
    """Separates plain stop strings from special tokens, which are returned as ids.

    Decoded text contains no special tokens, so they could not be found in it.

    Raises:
      ValueError: names a string that holds a special token and more.
    """
    strings, tokens = [], []
    for string in stop:
        ids = tokenizer.encode(string, parse_special=True)
        special = [i for i in ids if i in tokenizer.special_ids]
        if special and len(ids) > 1:
            raise ValueError(
                f"The stop string {string!r} holds a special token and more, which no text does; "
                "give the token alone"
            )
        if special:
            tokens += special
        else:
            strings.append(string)
    return strings, tokens


def check_text(text: str) -> None:
    """Refuses, by a ValueError, half of a surrogate pair, which JSON can hold but UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ord(text[error.start])
        raise ValueError(
            f"holds half of a surrogate pair, U+{half:04X}, at character {error.start}"
        ) from error


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuses a tokenizer with ids that a model of `vocab_size` tokens lacks."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"The tokenizer has {tokenizer.vocab_size} tokens but model.vocab_size={vocab_size}; "
            f"set model.vocab_size to {tokenizer.vocab_size} or more, or choose another tokenizer"
        )


def _token_ids(given: Mapping[str, Any], key: str) -> list[int]:
    """The ids under a key that may have one, several or none."""
    ids = given.get(key)
    listed = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(type(i) is int for i in listed):
        raise ValueError(f"{key}={ids!r} must be the id of a token or a list of ids")
    return listed
