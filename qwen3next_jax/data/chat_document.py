"""A chat as a training document: the model reads all of it, the loss is on assistant turns only.

There are two ways to find which characters the assistant wrote.

- If the template marks them by `{% generation %}...{% endgeneration %}`, the marks are used.
- Otherwise the template renders two prefixes of the chat: the messages before an answer, with the
  generation prompt, and the messages through the answer. If the text of the whole chat begins with
  both, the answer lies between their ends. That excludes its header, which belongs to the prompt,
  and includes its end-of-turn token. White space after that token has no loss.

Some templates render an answer differently once more messages follow: those of reasoning models,
for example, drop earlier thoughts. Then no single text shows every answer as the model would write
it, and training on it would teach the wrong text. Such a chat is refused, and the error says what
to do.

The whole text is tokenised at once. A token that spans a boundary belongs to the side of its first
character: where the line end of a header and the one that starts an answer are one token, that
token has no loss, because generation never starts in the middle of a token.

The result must not depend on the date: `strftime_now` is undefined, and most templates then use a
fixed date.
"""

import bisect
import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import numpy as np
from jaxtyping import Float32, Int32

from qwen3next_jax.data.chat import MARKS, Message, render_chat
from qwen3next_jax.data.tokenizer import Tokenizer

Render = Callable[..., str]  # `render_chat` of some messages, with all else as the chat has it


class MarkedText(NamedTuple):
    """A rendered chat, and the spans in it that the assistant wrote."""

    text: str
    spans: list[tuple[int, int]]  # [start, stop) in characters, in order
    exact: bool  # whether the spans are the template's own marks, not inferred from renderings


def chat_document(
    chat: Mapping[str, Any], tokenizer: Tokenizer, template: str
) -> dict[str, Int32[np.ndarray, " n"] | Float32[np.ndarray, " n"]]:
    """The inputs, targets and loss weights of a chat of n + 1 tokens.

    Args:
      chat: mapping with `messages` and optionally `tools` (JSON schemas) and
        `chat_template_kwargs` (further variables of the template). An assistant's message may have
        a `weight`: 1, or 0 to read it without a loss.
      tokenizer: the model's tokenizer; special tokens in the text are parsed.
      template: Jinja, as `load_chat_template` returns it.

    Returns:
      tokens, targets, int32, and loss_weights, float32: 1 where the target is part of an answer,
      else 0.

    Raises:
      ValueError: there are no messages, the template fails on them or does not show which
        characters are the assistant's, or no token has a loss.
    """
    marked = mark_answers(chat, template, special_tokens=tokenizer.special_tokens)
    ids, starts = tokenizer.encode_with_starts(marked.text, parse_special=True)
    weights = np.zeros(len(ids), np.float32)
    for begin, end in marked.spans:
        first, last = (bisect.bisect_left(starts, at) for at in (begin, end))
        if not marked.exact:
            last = _end_of_turn(ids, starts, marked.text[:end], first, last, tokenizer.special_ids)
        weights[first:last] = 1
    if not weights[1:].any():
        roles = ", ".join(dict.fromkeys(message["role"] for message in chat["messages"]))
        raise ValueError(
            f"no message of the assistant to learn from; the messages' roles are {roles}"
        )
    tokens = np.array(ids, np.int32)
    return {"tokens": tokens[:-1], "targets": tokens[1:], "loss_weights": weights[1:]}


def mark_answers(
    chat: Mapping[str, Any], template: str, *, special_tokens: Mapping[str, str] | None = None
) -> MarkedText:
    """Renders a chat and finds the assistant's turns with weight 1.

    Args:
      chat: see `chat_document`.
      template: Jinja.
      special_tokens: the tokenizer's, for the template.

    Raises:
      ValueError: see `chat_document`.
    """
    messages, weights = _messages(chat)
    switches = chat.get("chat_template_kwargs") or {}
    if not isinstance(switches, Mapping) or switches.keys() & _OURS:
        raise ValueError(
            f"chat_template_kwargs={switches!r} must be a mapping, of names other than "
            + ", ".join(sorted(_OURS))
        )
    tools = chat.get("tools") or None
    if tools is not None and not (
        isinstance(tools, Sequence) and all(isinstance(tool, Mapping) for tool in tools)
    ):
        raise ValueError(f"tools={tools!r:.80} must be a list of JSON schemas, not text of one")
    render: Render = functools.partial(
        render_chat,
        template=template,
        special_tokens=special_tokens,
        tools=tools,
        add_generation_prompt=False,
        **{"strftime_now": _NO_CLOCK, **switches},
    )
    text = render(messages)
    _require_shown(messages, weights, render, text)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if "endgeneration" not in template:
        spans = [_span(messages, i, render, text) for i in answers if weights[i]]
        return MarkedText(text, spans, False)
    spans = _marked_spans(messages, render, text)
    if not all(weights[i] for i in answers):
        if len(spans) != len(answers):
            raise ValueError(
                f"the template marks {len(spans)} answers with {{% generation %}} where there are "
                f"{len(answers)}, so it is unclear which of them have weight 0"
            )
        spans = [span for span, i in zip(spans, answers, strict=True) if weights[i]]
    return MarkedText(text, spans, True)


_OURS = {"messages", "template", "special_tokens", "tools", "add_generation_prompt", "marked"}
_NO_CLOCK = jinja2.Undefined(
    hint="the template asks for the date, on which a text to learn from may not depend; give one "
    "in chat_template_kwargs, under a name such as date_string"
)


def _messages(chat: Mapping[str, Any]) -> tuple[list[Message], list[int]]:
    """The messages without their `weight`, which templates do not know, and the weights."""
    given = chat.get("messages")
    if not isinstance(given, Sequence) or not given:
        raise ValueError(f"messages={given!r} must be a list of messages")
    messages: list[Message] = []
    weights: list[int] = []
    for i, message in enumerate(given):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {i} must be a mapping with a role and a content: {message}")
        if not isinstance(content := message.get("content"), str | Sequence | Mapping | None):
            raise ValueError(f"message {i} has content={content!r}; expected a text")
        weight = message.get("weight")
        if weight not in (None, 0, 1) or (weight is not None and message["role"] != "assistant"):
            raise ValueError(
                f"message {i} of role {message['role']!r} has weight={weight!r}; expected 0 or 1, "
                "at the assistant's messages"
            )
        messages.append({key: value for key, value in message.items() if key != "weight"})
        weights.append(1 if weight is None else weight)
    return messages, weights


def _require_shown(
    messages: Sequence[Message], weights: Sequence[int], render: Render, text: str
) -> None:
    """Refuses messages of which the template shows nothing, and tool calls that it does not show.

    Templates write an empty message for content that they do not know, such as a list of parts, and
    for none at all, and a model would learn to answer nothing. So what may be lost is marked, and
    the marks must show. Answers that are not learnt may be empty, and so may texts.
    """
    marks = {
        i: f"q3n{i}q3n"
        for i, message in enumerate(messages)
        if (message["role"] != "assistant" or weights[i]) and _may_be_lost(message, text)
    }
    if not marks:
        return
    marked = [
        _marked_message(message, marks[i]) if i in marks else message
        for i, message in enumerate(messages)
    ]
    try:
        shown = render(marked)
    except ValueError:
        return  # the template looks closely at what it is given
    for i, mark in marks.items():
        message, content = messages[i], messages[i].get("content")
        what = None
        way_out = "give its content as a text"
        if isinstance(content, str):
            way_out = "give another template, or content that this one reads, such as parts"
        if isinstance(content, list) and content and str(content) in text:
            what = "Python's form of its content"
        elif mark not in shown and message.get("tool_calls"):
            what, way_out = "nothing of its tool_calls", "give a template that knows tools"
        elif mark not in shown and (marked[i] != message or message["role"] == "assistant"):
            what = "nothing of it"
        if what:
            raise ValueError(
                f"message {i}: the template shows {what}, {dict(message)!r:.200}; {way_out}"
            )


def _may_be_lost(message: Message, text: str) -> bool:
    content = message.get("content")
    if not isinstance(content, str) or message.get("tool_calls"):
        return True
    return message["role"] == "assistant" and content.strip() not in text


def _marked_message(message: Message, mark: str) -> Message:
    if calls := message.get("tool_calls"):
        return {**message, "tool_calls": _marked(calls, mark)}
    if isinstance(content := message.get("content"), str):
        return {**message, "content": content + mark}
    return _marked(message, mark)


def _marked(value: Any, mark: str) -> Any:
    """A message or a part of it, with a mark behind each text and each number."""
    if isinstance(value, Mapping):
        kept = ("role", "type", "id")
        return {k: v if k in kept else _marked(v, mark) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(v, mark) for v in value]
    if isinstance(value, bool) or value is None:
        return value
    return f"{value}{mark}"


def _marked_spans(messages: Sequence[Message], render: Render, text: str) -> list[tuple[int, int]]:
    """The spans between the template's own marks."""
    parts = re.split(f"([{''.join(MARKS)}])", render(messages, marked=True))
    # `parts` alternates text and marks. The marks are trusted only if they come in pairs and are
    # the only change to the text: then no message held them and no filter of the template moved
    # them.
    if "".join(parts[::2]) != text or parts[1::2] != list(MARKS) * (len(parts) // 4):
        raise ValueError(
            "the template's {% generation %} marks cannot be followed; each must end where it "
            "began, in the text and not in a variable that is changed afterwards"
        )
    ends = list(itertools.accumulate(map(len, parts[::2])))
    return list(zip(ends[:-1:2], ends[1::2], strict=True))


def _span(messages: Sequence[Message], i: int, render: Render, text: str) -> tuple[int, int]:
    """The span of answer `i` in the text, inferred from the template's renderings."""
    try:
        before = render(messages[:i])
        prompt = render(messages[:i], add_generation_prompt=True)
    except ValueError as error:
        raise ValueError(
            f"message {i}: the template cannot render what comes before this answer ({error}). "
            f"{_REMEDY}"
        ) from error
    through = render(messages[: i + 1])
    for what, part in (("before it, with the prompt for it,", prompt), ("through it", through)):
        if not text.startswith(part):
            same = _common_prefix(part, text)
            raise ValueError(
                f"message {i}: the template does not show this answer as the model would write "
                f"it. Rendered {what} the chat has {part[same : same + 40]!r} where the whole has "
                f"{text[same : same + 40]!r}. {_REMEDY}"
            )
    if len(prompt) > len(through):
        raise ValueError(f"message {i}: the template writes nothing for this answer. {_REMEDY}")
    if prompt == before:
        # Either answers have no header, or the template knows nothing of prompts.
        header = _header(messages[:i], render)[len(before) :]
        if header:
            raise ValueError(
                f"message {i}: the template writes {header!r} in front of an answer but has no "
                f"prompt for one: it ignores add_generation_prompt. {_REMEDY}"
            )
    return len(prompt), len(through)


_REMEDY = (
    'Give this message "weight": 0, so that it is read and not learnt, or, as data.chat_template, '
    "a template that marks what is to be learnt by {% generation %} and {% endgeneration %}"
)


def _header(before: Sequence[Message], render: Render) -> str:
    """What the template writes before the content of an answer that follows these messages."""
    a, b = (
        render([*before, {"role": "assistant", "content": content}]) for content in ("yes", "no")
    )
    return a[: _common_prefix(a, b)]


def _common_prefix(a: str, b: str) -> int:
    """The length of the beginning that two texts share."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((k for k, (x, y) in pairs if x != y), min(len(a), len(b)))


def _end_of_turn(
    ids: Sequence[int],
    starts: Sequence[int],
    text: str,
    first: int,
    last: int,
    special: frozenset[int],
) -> int:
    """`last`, moved back before white space that follows a special token at the end of `text`."""
    ends = [*starts[first + 1 : last], len(text)]
    end = last
    while end > first and text[starts[end - 1] : ends[end - 1 - first]].isspace():
        end -= 1
    return end if end > first and ids[end - 1] in special else last
