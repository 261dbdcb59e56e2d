"""Chats are rendered as transformers renders them, and templates that fail say why."""

import json

import pytest
from hf_tokenizer import CHATML, make_tokenizer_json
from transformers import PreTrainedTokenizerFast

from qwen3next_jax.data.chat import load_chat_template, render_chat
from qwen3next_jax.data.tokenizer import HuggingFaceTokenizer

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'Says <what> it\'s like & "how" warm: °C',
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
USER = {"role": "user", "content": "  Wie ist's in Köln & <Bonn>?\n"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Köln"}}}],
}
CHATS = {
    "one question": [USER],
    "system first": [{"role": "system", "content": "Be brief."}, USER],
    "several turns": [USER, {"role": "assistant", "content": "Warm.\n"}, USER],
    "a tool": [
        {"role": "system", "content": "Be brief."},
        USER,
        CALL,
        {"role": "tool", "content": '{"celsius": 21}'},
        {"role": "assistant", "content": "21 °C."},
        USER,
    ],
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_tokenizer_json(tmp_path_factory.mktemp("model")).parent


@pytest.mark.parametrize("switches", [{}, {"enable_thinking": False}])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("chat", CHATS)
def test_text_and_tokens_are_those_of_transformers(directory, chat, prompt, tools, switches):
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"), eos_token="<|im_end|>"
    )
    asked = dict(add_generation_prompt=prompt, tools=tools, **switches)
    want = theirs.apply_chat_template(CHATS[chat], chat_template=CHATML, tokenize=False, **asked)
    tokenizer = HuggingFaceTokenizer(directory / "tokenizer.json")
    got = render_chat(CHATS[chat], CHATML, special_tokens=tokenizer.special_tokens, **asked)
    assert got == want
    assert "<|im_start|>user\n  Wie ist's in Köln & <Bonn>?\n<|im_end|>\n" in got
    want = theirs.apply_chat_template(CHATS[chat], chat_template=CHATML, return_dict=False, **asked)
    assert tokenizer.encode(got, parse_special=True) == want


def test_a_prompt_for_the_answer_is_the_default():
    assert render_chat([USER], CHATML).endswith("<|im_start|>assistant\n")


def test_a_template_may_ask_for_documents_which_are_none_unless_given():
    template = "{{ documents is none }}"
    assert render_chat([], template) == "True"
    assert render_chat([], template, documents=[]) == "False"


def test_keys_that_are_null_are_absent_as_in_transformers():
    template = "{% for m in messages %}{{ m.role }}{{ m.content }}{{ m.tool_calls }}{% endfor %}"
    asks = {"role": "assistant", "content": None, "tool_calls": ["z"]}
    messages = [{"role": "user", "content": "x", "tool_calls": None}, asks]
    assert render_chat(messages, template) == "userxassistant['z']"
    # But as content that the template asks for: some show tool calls only then.
    asking = "{% for m in messages if m['content'] is none %}{{ m.tool_calls }}{% endfor %}"
    assert render_chat(messages, asking) == "['z']"


def test_a_template_can_ask_for_the_date():
    year = render_chat([], "{{ strftime_now('%Y') }}")
    assert year.isdigit()
    assert int(year) >= 2026


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        ("{% if %}", [USER], "Line 1 of the chat template: Expected an expression"),
        ("a\nb {% endfor %}", [USER], "Line 2 of the chat template"),
        (CHATML, [USER, {"role": "system", "content": "x"}], "The system message must come first"),
        (CHATML, [{"role": "user"}], "cannot render these messages: .*content"),
        (CHATML, [{"role": "user", "content": None}], "cannot render these messages: .*content"),
        ("{{ 'text'.split('') }}", [USER], "cannot render these messages: empty separator"),
        ("{{ 1 / 0 }}", [USER], "cannot render these messages: division by zero"),
        ("{{ messages.append(1) }}", [USER], "'append' of 'list' object is unsafe"),
        ("{{ messages.__class__.__mro__ }}", [USER], "'__class__' of 'list' object is unsafe"),
    ],
)
def test_what_a_template_refuses_or_may_not_do_is_a_value_error(template, messages, message):
    with pytest.raises(ValueError, match=message):
        render_chat(messages, template)


def test_the_template_is_found_in_all_its_places(tmp_path):
    config = tmp_path / "tokenizer_config.json"
    with pytest.raises(FileNotFoundError, match=r"expected chat_template\.jinja, or chat_template"):
        load_chat_template(tmp_path)
    config.write_text(json.dumps({"chat_template": None}))
    with pytest.raises(FileNotFoundError, match="Base models have none"):
        load_chat_template(tmp_path)
    config.write_text(json.dumps({"chat_template": "one"}))
    assert load_chat_template(tmp_path) == "one"
    named = [{"name": "default", "template": "two"}, {"name": "tool_use", "template": "three"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert load_chat_template(tmp_path) == "two"
    assert load_chat_template(tmp_path, name="tool_use") == "three"
    with pytest.raises(ValueError, match=r"no chat template 'rag'; choose from \['default', 'to"):
        load_chat_template(tmp_path, name="rag")
    config.write_text(json.dumps({"chat_template": {"default": "2", "tool_use": "3"}}))
    assert load_chat_template(tmp_path, name="tool_use") == "3"
    (tmp_path / "chat_template.jinja").write_text("four\n", encoding="utf-8")
    assert load_chat_template(tmp_path) == "four\n"
    more = tmp_path / "additional_chat_templates"
    more.mkdir()
    (more / "rag.jinja").write_text("five")
    assert load_chat_template(tmp_path, name="rag") == "five"
    with pytest.raises(ValueError, match=r"choose from \['default', 'rag'\]"):
        load_chat_template(tmp_path, name="tool_use")
    config.write_text("[]")
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"tokenizer_config\.json holds a list; expected a JSON"):
        load_chat_template(tmp_path)
