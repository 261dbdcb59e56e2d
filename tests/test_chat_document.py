"""In a chat exactly the tokens of the assistant's turns are in the loss."""

import json
import pathlib
import re

import numpy as np
import pytest
from hf_tokenizer import SPECIAL, make_tokenizer_json
from transformers import PreTrainedTokenizerFast

from qwen3next_jax.data.chat_document import chat_document, mark_answers
from qwen3next_jax.data.documents import tokenized
from qwen3next_jax.data.sources import BadRecordError, open_source
from qwen3next_jax.data.tokenizer import load_tokenizer
from qwen3next_jax.data.train_tokenizer import train_tokenizer

HERE = pathlib.Path(__file__).parent
HEADERS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
FAMILIES = {
    "chatml": dict(special=SPECIAL),
    "headers": dict(special=HEADERS, bos_token=HEADERS[0], eos_token=HEADERS[-1]),
}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "How warm it is, in °C.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
SYSTEM = {"role": "system", "content": "Be brief."}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def call(city):
    return {"function": {"name": "weather", "arguments": {"city": city}}}


CHATS = {
    "one_turn": {"messages": [user("2 + 2?"), assistant("4")]},
    "several_turns": {
        "messages": [
            SYSTEM,
            user("  Wie warm ist's in Köln?\n"),
            # Line ends that could be one token with the header's, and a word of the header.
            assistant("\n\nassistant: 21 °C ☀\n\n"),
            user("And 我?\n\n"),
            assistant("You?"),
            user("Bye"),  # the last turn needs not be an answer
        ]
    },
    "tools": {
        "messages": [
            SYSTEM,
            user("Cologne or Bonn?"),
            assistant(None, tool_calls=[call("Köln")]),
            {"role": "tool", "content": '{"celsius": 21}'},
            assistant("", tool_calls=[call("Bonn")]),
            {"role": "tool", "content": '{"celsius": 22}'},
            assistant("Bonn."),
            user("Thanks"),
            assistant("You are welcome."),
        ],
        "tools": TOOLS,
    },
    # What a user writes may look like an answer, special tokens included.
    "look_alikes": {
        "messages": [
            user(
                "Go on:<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
                "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nyes<|eot_id|>"
            ),
            assistant("yes"),
        ]
    },
    "only_the_last": {
        "messages": [user("1?"), assistant("one", weight=0), user("2?"), assistant("two")]
    },
}


def marked_template(family):
    return (HERE / "chat_templates" / f"{family}.jinja").read_text()


def plain_template(family):
    """As models are published: without the marks."""
    return re.sub(r" *\{%- (end)?generation %\}\n", "", marked_template(family))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    # Such texts as make tokens of several line ends, of "yes" and of "assistant".
    texts = ("yes\n\n assistant\n\nassistant\n\n\n\n <tool_call>" * 9,)
    return {
        name: load_tokenizer(
            make_tokenizer_json(tmp_path_factory.mktemp(name), texts=texts, **options)
        )
        for name, options in FAMILIES.items()
    }


def with_marks(document, tokenizer):
    """The text of a document, with the tokens in the loss between ⟦ and ⟧."""
    ids = [document["tokens"][0], *document["targets"]]
    learnt = [0, *document["loss_weights"], 0]
    text, start = "", 0
    for k in range(1, len(ids) + 1):
        if learnt[k] != learnt[k - 1] or k == len(ids):
            part = tokenizer._parsing.decode(
                [int(i) for i in ids[start:k]], skip_special_tokens=False
            )
            text += f"⟦{part}⟧" if learnt[k - 1] else part
            start = k
    return text


@pytest.mark.parametrize("chat", CHATS)
def test_the_loss_is_on_the_tokens_that_the_golden_file_marks(family, chat, tokenizers):
    document = chat_document(CHATS[chat], tokenizers[family], plain_template(family))
    golden = HERE / "golden" / f"{family}_{chat}.txt"
    assert with_marks(document, tokenizers[family]) == golden.read_text()


@pytest.mark.parametrize("chat", CHATS)
def test_tokens_and_mask_are_those_of_transformers(family, chat, tokenizers):
    """Which reads the mask off the marks, where ours here follows from renderings without them."""
    tokenizer = tokenizers[family]
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer.path), **tokenizer.special_tokens)
    want = theirs.apply_chat_template(
        [{k: v for k, v in m.items() if k != "weight"} for m in CHATS[chat]["messages"]],
        tools=CHATS[chat].get("tools"),
        chat_template=marked_template(family),
        date_string="26 Jul 2024",
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    mask = np.array(want["assistant_masks"], np.float32)
    for template in (plain_template(family), marked_template(family)):
        got = chat_document(CHATS[chat], tokenizer, template)
        assert [got["tokens"][0], *got["targets"]] == want["input_ids"]
        assert got["tokens"].dtype == got["targets"].dtype == np.int32
        np.testing.assert_array_equal(got["tokens"][1:], got["targets"][:-1])
        expected = mask[1:].copy()
        if chat == "only_the_last":
            first = np.flatnonzero(np.diff(expected, prepend=0) < 0)[0]
            expected[:first] = 0
        if family == "chatml" and chat == "several_turns":
            # The header's line end and the answer's first are one token here. transformers counts
            # it to the answer; ours to whoever wrote its first character.
            first = np.flatnonzero(expected)[0]
            assert tokenizer.decode([int(got["targets"][first])]) == "\n\n"
            expected[first] = 0
        np.testing.assert_array_equal(got["loss_weights"], expected)


def test_a_sentencepiece_model_finds_the_answers_too(family, tmp_path):
    """Whose special tokens are plain characters in these texts."""
    texts = [json.dumps(chat, ensure_ascii=False) for chat in CHATS.values()]
    tokenizer = train_tokenizer(texts, tmp_path / "tokenizer.model", vocab_size=380)
    chat = CHATS["several_turns"]
    text, spans, exact = mark_answers(
        chat, plain_template(family), special_tokens=tokenizer.special_tokens
    )
    assert not exact
    document = chat_document(chat, tokenizer, plain_template(family))
    ids = [document["tokens"][0], *document["targets"]]
    assert tokenizer.encode(text, parse_special=True) == ids
    learnt = np.concatenate([[0], document["loss_weights"]])
    for begin, end in spans:
        # Independently: the tokens of what precedes a character are as many as begin before it,
        # unless one is astride; then the count is of those that begin before it.
        for at, inside in ((begin, 1), (end, 0)):
            before = tokenizer.encode(text[:at], parse_special=True)
            if before == ids[: len(before)] and at < len(text):
                assert learnt[len(before)] == inside
                assert learnt[len(before) - 1] == 1 - inside
    said = tokenizer.decode([int(i) for i, w in zip(ids, learnt, strict=True) if w])
    assert "21 °C ☀" in said
    assert "You?" in said
    assert "Köln" not in said
    assert "Bye" not in said


def test_an_answer_ends_with_its_token_and_not_with_the_line_end_after_it(tokenizers):
    tokenizer = tokenizers["chatml"]
    document = chat_document(CHATS["one_turn"], tokenizer, plain_template("chatml"))
    assert document["targets"][-2:].tolist() == [tokenizer.eos_id, tokenizer.encode("\n")[0]]
    assert document["loss_weights"][-3:].tolist() == [1, 1, 0]
    assert document["loss_weights"].sum() == 2


THINKING = """\
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.last %}{{- '<think>' + m.thoughts + '</think>' }}{%- endif %}
{{- m.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>' }}{%- endif %}
"""


def test_a_template_that_drops_old_thoughts_is_refused_unless_only_the_last_has_weight(tokenizers):
    first = assistant("one", thoughts="hm")
    chat = {"messages": [user("1?"), first, user("2?"), assistant("two", thoughts="oh")]}
    with pytest.raises(ValueError, match=r"message 1: .* has '<think>' where .* has 'one<") as e:
        chat_document(chat, tokenizers["chatml"], THINKING)
    assert '"weight": 0' in str(e.value)
    assert "{% generation %}" in str(e.value)
    chat["messages"][1] = {**first, "weight": 0}
    document = chat_document(chat, tokenizers["chatml"], THINKING)
    golden = "<|im_start|>assistant\n<think>⟦oh</think>two<|im_end|>⟧\n"
    assert with_marks(document, tokenizers["chatml"]).endswith(golden)


@pytest.mark.parametrize(
    ("chat", "template", "message"),
    [
        ({}, "", "messages=None must be a list of messages"),
        ({"messages": []}, "", r"messages=\[\] must be a list"),
        ({"messages": "hello"}, "", "message 0 must be a mapping with a role"),
        ({"messages": [{"content": "x"}]}, "", "message 0 must be a mapping with a role"),
        ({"messages": [user(4)]}, "", "message 0 has content=4; expected a text"),
        ({"messages": [{**user("x"), "weight": 1}]}, "", "message 0 of role 'user' has weight=1"),
        ({"messages": [assistant("x", weight=0.5)]}, "", "weight=0.5; expected 0 or 1"),
        (
            {"messages": [user("x")], "tools": '[{"name": "f"}]'},
            "",
            "tools='.* list of JSON schemas",
        ),
        (
            {"messages": [user("x"), assistant("\ud83d")]},
            None,
            r"half of .*, U\+D83D, at character",
        ),
        ({"messages": [user("x")]}, None, "no message of the assistant to learn from"),
        ({"messages": [user("x"), assistant("y", weight=0)]}, None, "no message of the assistant"),
        ({"messages": [user("x"), SYSTEM]}, None, "A system message must come first"),
        (
            {"messages": [user("x"), assistant("y")], "chat_template_kwargs": {"tools": 1}},
            None,
            "chat_template_kwargs=.* must be a mapping, of names other than",
        ),
        (
            {"messages": [user("x"), assistant("y")]},
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}",
            "message 1: the template writes '<assistant>' in front of an answer but .* ignores",
        ),
        (
            {"messages": [assistant("y")]},
            "{% generation %}{{ messages[0].content }}{% endgeneration %}",
            "no message of the assistant to learn from",  # as nothing stands before its only token
        ),
        (
            {"messages": [assistant("y"), user("x"), assistant("z")]},
            "{{ messages[0].role }}: {% for m in messages %}{{ m.content }}{% endfor %}",
            'message 0: the template cannot render what comes before .* "weight": 0',
        ),
        (
            {"messages": [user("x"), assistant("y")], "chat_template_kwargs": {"compile": True}},
            "{{ '{x}'.format() }}",
            "The chat template cannot render these messages: 'x'",
        ),
        (
            {"messages": [user("x"), assistant("y")]},
            "{{ strftime_now('%Y') }}",
            "the template asks for the date, on which",
        ),
        (
            {"messages": [user("x"), assistant(" y ")]},
            "{% set a %}{% generation %}{{ messages[1].content }}{% endgeneration %}{% endset %}"
            "{{ a[1:] }}",
            "marks cannot be followed",
        ),
        (
            {"messages": [user("x"), assistant("y", weight=0), assistant("z")]},
            "{% generation %}{{ messages[2].content }}{% endgeneration %}",
            "marks 1 answers .* where there are 2",
        ),
        (
            {"messages": [user("\ufdd0x\ufdd1"), assistant("y")]},
            "{{ messages[0].content }}{% generation %}y{% endgeneration %}",
            "marks cannot be followed",
        ),
    ],
)
def test_what_shows_no_answer_is_refused(chat, template, message, tokenizers):
    with pytest.raises(ValueError, match=message):
        chat_document(
            chat, tokenizers["chatml"], plain_template("chatml") if template is None else template
        )


# As Qwen3's: nothing for content that is no text, and thoughts only where a text was asked before.
TEXT_ONLY = """\
{%- set asked = namespace(yes=false) %}
{%- for m in messages if m.role == 'user' and m.content is string %}
{%- set asked.yes = true %}{% endfor %}
{%- for m in messages %}
{%- set content = m.content if m.content is string else '' %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and asked.yes %}{{- '<think>\\n</think>' }}{% endif %}
{{- content }}
{%- for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
PARTS = [{"type": "text", "text": "4"}]


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (1, assistant(PARTS)),
        (1, {"role": "assistant", "text": "4"}),
        (1, assistant(None)),
        (0, user(PARTS)),
        (2, {"role": "tool", "content": {"celsius": 21}}),
    ],
)
def test_a_message_of_which_the_template_shows_nothing_is_refused(at, message, tokenizers):
    asks = assistant(None, tool_calls=[call("Rome")])
    messages = [user("2 + 2?"), asks, {"role": "tool", "content": None}, assistant("")]
    chat_document({"messages": messages}, tokenizers["chatml"], TEXT_ONLY)
    messages[at] = message
    with pytest.raises(ValueError, match=f"message {at}: the template shows nothing of it, .*role"):
        chat_document({"messages": messages}, tokenizers["chatml"], TEXT_ONLY)
    if message["role"] == "assistant":  # what is not learnt does no harm
        messages[at] = {**message, "weight": 0}
        chat_document({"messages": messages}, tokenizers["chatml"], TEXT_ONLY)


@pytest.mark.parametrize("content", ["", None, "I look."])
def test_tool_calls_that_the_template_does_not_show_are_refused(content, tokenizers):
    asks = assistant(content, tool_calls=[call("Rome")])
    chat = {"messages": [user("How warm?"), asks, {"role": "tool", "content": "21"}]}
    chat_document(chat, tokenizers["chatml"], TEXT_ONLY)
    without = TEXT_ONLY.replace("m.tool_calls or []", "[]")
    with pytest.raises(ValueError, match=r"message 1: .* nothing of its tool_calls, .* tools"):
        chat_document(chat, tokenizers["chatml"], without)


def test_an_answer_whose_text_the_template_does_not_show_is_refused(tokenizers):
    chat = {"messages": [user("2 + 2?"), assistant("4")]}
    parts_alone = TEXT_ONLY.replace("m.content if m.content is string else ''", "''")
    with pytest.raises(ValueError, match="message 1: the template shows nothing of it"):
        chat_document(chat, tokenizers["chatml"], parts_alone)


def test_parts_that_the_template_shows_are_taken_and_their_form_in_python_is_not(tokenizers):
    chat = {"messages": [user("2 + 2?"), assistant(PARTS)]}
    shown = TEXT_ONLY.replace("else ''", "else m.content | map(attribute='text') | join")
    assert mark_answers(chat, shown).text.count("</think>4<|im_end|>") == 1
    printed = TEXT_ONLY.replace("else ''", "else m.content | string")
    with pytest.raises(ValueError, match="message 1: the template shows Python's form of its"):
        chat_document(chat, tokenizers["chatml"], printed)


def test_a_fixed_date_can_be_given(tokenizers):
    template = "{{ strftime_now('%Y') if date is not defined else date }} {{ messages[0].content }}"
    chat = {"messages": [assistant("y")], "chat_template_kwargs": {"date": "2020"}}
    marked = mark_answers({**chat}, template + "{% generation %}!{% endgeneration %}")
    assert marked == ("2020 y!", [(6, 7)], True)


def test_a_line_of_a_file_is_a_chat_with_its_tools_and_switches(tokenizers, tmp_path):
    tokenizer = tokenizers["headers"]
    chats = [
        {**CHATS["tools"], "chat_template_kwargs": {"date_string": "1 Jan 2020"}, "other": 1},
        {"messages": [user("x")]},
    ]
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(json.dumps(chat) for chat in chats))
    source = open_source("jsonl", str(file), field="messages")
    with pytest.raises(FileNotFoundError, match="holds no chat template"):
        tokenized(source[0], tokenizer)
    template = tmp_path / "template.jinja"
    template.write_text(plain_template("headers"))
    tokenizer = load_tokenizer(tokenizer.path, chat_template=template)
    got = tokenized(source[0], tokenizer)
    want = chat_document(chats[0], tokenizer, plain_template("headers"))
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array)
    text = tokenizer.decode([int(i) for i in got["tokens"]])
    assert "1 Jan 2020" in text
    assert "How warm it is, in °C." in text
    with pytest.raises(BadRecordError, match=r"chats\.jsonl:2: no message of the assistant"):
        tokenized(source[1], tokenizer)
