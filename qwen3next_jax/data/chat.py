"""Renders messages to the text that a chat model was trained on, by the model's Jinja template.

A template is code from whoever published the model, so it runs in Jinja's sandbox, where it can
change nothing and reach no file. The environment follows the conventions of transformers'
`apply_chat_template`. In the rendered text "<|im_start|>" and the like are tokens: encode it with
`parse_special=True` and without BOS, which the template writes if it wants one.
"""

import datetime
import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from etils import epath

from qwen3next_jax.config import read_json

Message = Mapping[str, Any]


def render_chat(
    messages: Sequence[Message],
    template: str,
    *,
    special_tokens: Mapping[str, str] | None = None,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    marked: bool = False,
    **switches: Any,
) -> str:
    """The text of a conversation.

    Args:
      messages: `{"role": "user", "content": "..."}` and so on, as the template expects them.
      template: Jinja, as `load_chat_template` returns it.
      special_tokens: the tokenizer's; templates read `bos_token` and its like by these names.
      add_generation_prompt: whether to end with the header of the assistant's next answer.
      tools: JSON schemas of functions that the model may call.
      marked: whether to write each `{% generation %}` block of the template between `MARKS`.
      switches: further variables of the template, such as `enable_thinking`.

    Raises:
      ValueError: the template is no Jinja, refuses these messages, or fails on them.
    """
    variables = {
        "messages": [_without_nulls(message, template) for message in messages],
        "tools": tools,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        **(special_tokens or {}),
        **switches,
    }
    try:
        return _compile(template, marked).render(variables)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"Line {error.lineno} of the chat template: {error.message}") from error
    except (
        jinja2.TemplateError,
        TypeError,
        ValueError,
        ArithmeticError,
        LookupError,
        RecursionError,
        MemoryError,
    ) as error:
        # Python's errors in a template's expressions: None + "<|im_end|>", "text".split(""), 1 / 0.
        raise ValueError(f"The chat template cannot render these messages: {error}") from error


def _without_nulls(message: Message, template: str) -> Message:
    """A message without its null keys.

    Templates write None for a null key, or fail, but know a missing one, so transformers drops them
    as well. But some show tool calls only where `content is none`, for which that one is kept.
    """
    stays = "content" if _asks_for_null_content(template) else None
    return {k: v for k, v in message.items() if v is not None or k == stays}


@functools.lru_cache(maxsize=32)
def _asks_for_null_content(template: str) -> bool:
    return re.search(r"content.{0,2}\s+is\s+(not\s+)?none", template) is not None


# Noncharacters: code points that Unicode never assigns, so no text should hold them.
MARKS = ("\ufdd0", "\ufdd1")


ADDITIONAL_TEMPLATES = "additional_chat_templates"  # a folder, as transformers writes it


def load_chat_template(directory: str | os.PathLike, *, name: str = "default") -> str:
    """The chat template of a Hugging Face model directory.

    It is in `chat_template.jinja`, or under `chat_template` of `tokenizer_config.json`. There may
    be several with names: `additional_chat_templates/NAME.jinja` has those beside the default.

    Raises:
      FileNotFoundError: the directory has no chat template.
      ValueError: none is called `name`, or a file is damaged.
    """
    folder = epath.Path(directory)
    alone, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if alone.exists():
        more = (folder / ADDITIONAL_TEMPLATES).glob("*.jinja")
        named = {"default": alone.read_text(), **{file.stem: file.read_text() for file in more}}
    else:
        given = read_json(config).get("chat_template")
        if given is None:
            raise FileNotFoundError(
                f"{directory} holds no chat template; expected chat_template.jinja, or "
                "chat_template in tokenizer_config.json. Base models have none: prompt them with "
                "plain text, and to fine-tune one give a file as data.chat_template"
            )
        if isinstance(given, list):
            given = {template["name"]: template["template"] for template in given}
        named = {"default": given} if isinstance(given, str) else given
    if name not in named:
        raise ValueError(f"{directory} has no chat template {name!r}; choose from {sorted(named)}")
    return named[name]


@functools.lru_cache(maxsize=32)
def _compile(template: str, marked: bool) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, _MarkedGeneration if marked else _Generation],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes < and & for HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's words; drops the marks."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Leaves the body in its place."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _MarkedGeneration(_Generation):
    """Writes `MARKS` around what the assistant wrote."""

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Leaves the body in its place, between the marks."""
        begin, end = (jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)]) for mark in MARKS)
        return [begin, *super().parse(parser), end]
