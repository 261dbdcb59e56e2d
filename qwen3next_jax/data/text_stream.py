"""Streams the text of a continuation as its tokens arrive, up to a stop string.

Text is held back for two reasons. A character may be spread over several tokens, and decodes to
U+FFFD until the last one arrives. And the end of the text may be the beginning of a stop string.
Returned text never changes, so it can be printed.
"""

from collections.abc import Iterable, Sequence

from qwen3next_jax.data.tokenizer import Tokenizer

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_MOST_SPACES = 32  # tokens


class TextStream:
    r"""Turns the tokens of one row into text incrementally.

        stream = TextStream(tokenizer, stop=["\n\n"])
        for tokens in ...:
            print(stream.feed(tokens), end="")
            if stream.stopped:
                break
        print(stream.finish())

    Of several stop strings the one that is complete first wins, and of those the longest, so the
    text does not depend on how the tokens were split over calls.

    Attributes:
      text: all text returned so far; after `finish` or a stop string, the whole text, which ends
        before that string.
      stopped: whether a stop string was met; further tokens change nothing.

    Raises:
      ValueError: a stop string is empty.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        if "" in stop:
            raise ValueError("A stop string is empty; every text would end at once")
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._held = ""  # decoded, perhaps the beginning of a stop string
        # Tokens are decoded together with those since the last boundary but one, because tokenizers
        # may treat the beginning of a text specially: they drop its spaces. A boundary comes after
        # whole characters that are not all spaces. From a long run of spaces only the last token is
        # kept after the boundary, because every token decodes the whole window.
        self._window: list[int] = []
        self._boundary = 0  # the last one, as an index in the window
        self._seen = 0  # how much of the window's text has been taken

    def feed(self, tokens: Iterable[int]) -> str:
        """Adds tokens; returns the text that has become certain."""
        return self._take("".join(map(self._decode, tokens)))

    def finish(self) -> str:
        """Returns the rest after the last token; an incomplete character is U+FFFD."""
        rest = self._tokenizer.decode(self._window)[self._seen :]
        self._window, self._boundary, self._seen = [], 0, 0
        return self._take(rest, last=True)

    def _decode(self, token: int) -> str:
        """The characters that this token completes."""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        complete = text.rstrip(_INCOMPLETE)
        new = complete[self._seen :]
        self._seen += len(new)
        if new.strip() and complete == text:
            self._window = self._window[self._boundary :]
            self._boundary = len(self._window)
            self._seen = len(self._tokenizer.decode(self._window))
        elif complete == text and len(self._window) > self._boundary + _MOST_SPACES:
            self._window = [*self._window[: max(self._boundary, 1)], token]
            self._seen = len(self._tokenizer.decode(self._window))
        return new

    def _take(self, new: str, *, last: bool = False) -> str:
        """Returns the held and new text up to any stop string, and holds back its beginnings."""
        if self.stopped:
            return ""
        text = self._held + new
        met = [(text.find(stop) + len(stop), -len(stop)) for stop in self._stop if stop in text]
        if met:
            end, minus_length = min(met)
            self.stopped, self._held, text = True, "", text[: end + minus_length]
        else:
            free = len(text) if last else len(text) - self._beginning(text)
            text, self._held = text[:free], text[free:]
        self.text += text
        return text

    def _beginning(self, text: str) -> int:
        """Length of the longest suffix of `text` that is a prefix of a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        return next(
            (
                n
                for n in range(min(longest, len(text)), 0, -1)
                if any(stop.startswith(text[-n:]) for stop in self._stop)
            ),
            0,
        )
