"""The tokenizer loses nothing, depends on the texts only, and is refused where it cannot serve.

A `tokenizer.json` is read as transformers reads it, with what the files beside it say.
"""

import json
import random
import subprocess
import sys

import pytest
import sentencepiece
from hf_tokenizer import make_tokenizer_json
from transformers import PreTrainedTokenizerFast

from qwen3next_jax.data import train_tokenizer as training
from qwen3next_jax.data.corpus import load_data
from qwen3next_jax.data.documents import RecordTexts, tokenized
from qwen3next_jax.data.sources import BadRecordError, open_source
from qwen3next_jax.data.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    check_vocabulary,
    encode_prompt,
    fingerprint,
    keep_tokenizer,
    load_tokenizer,
)
from qwen3next_jax.data.train_tokenizer import train_tokenizer

TEXTS = [
    "".join(
        f"def f{i}(value, other={j}):\n    if value > other:\n        return self.name_{i}[{j}]\n\n"
        for j in range(20)
    )
    for i in range(20)
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "model"
    return train_tokenizer(TEXTS, path, vocab_size=400)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  leading",
        "trailing \n",
        "\t\ttabs\tand spaces  ",
        "CRLF\r\n\r\n",
        "\n\n\n",
        "▁",
        " ▁ ▁▁",
        "a▁b é▁é",
        "▅",
        "\0",
        "a\0b",
        "<s></s><unk><0x41>",
        "\ufeffBOM",
        "e\u0301 ﬁ ① Ａ",
        "\u3000\xa0\u2028",
        "日本語🎉👩‍👩‍👧",
        TEXTS[0],
    ],
)
def test_decode_undoes_encode(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decode_undoes_encode_on_random_unicode(tokenizer):
    rng = random.Random(0)
    valid = [c for c in map(chr, range(sys.maxunicode + 1)) if not "\ud800" <= c <= "\udfff"]
    ordinary = " \t\r\n▁▅abcdef():=.<>0x_é"
    for _ in range(2000):
        source = rng.choice([valid, valid[:1000], ordinary])
        text = "".join(rng.choices(source, k=rng.randrange(30)))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_encode_adds_neither_bos_nor_eos(tokenizer):
    ids = tokenizer.encode("<s>" + TEXTS[0] + "</s>")
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    assert max(ids) < tokenizer.vocab_size


def test_tokens_written_in_text_are_parsed_only_when_asked(tokenizer):
    ids = tokenizer.encode("<s>a b</s>", parse_special=True)
    assert ids == [tokenizer.bos_id, *tokenizer.encode("a b"), tokenizer.eos_id]
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


def test_decode_leaves_out_bos_and_eos(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("if x:"), tokenizer.eos_id]
    assert tokenizer.decode(ids) == "if x:"


def test_decode_marks_ids_beyond_the_vocabulary(tokenizer):
    ids = [*tokenizer.encode("a"), tokenizer.vocab_size + 7]
    assert tokenizer.decode(ids) == "a ⁇ "


def test_an_indentation_is_one_token(tokenizer):
    assert len(tokenizer.encode(" " * 8)) == 1


def test_the_same_texts_give_the_same_file_in_another_process(tmp_path):
    script = (
        "import sys; from qwen3next_jax.data.train_tokenizer import train_tokenizer as train;"
        "train(eval(sys.argv[1]), sys.argv[2], vocab_size=300)"
    )
    train_tokenizer(TEXTS[:3], tmp_path / "a", vocab_size=300)
    subprocess.run([sys.executable, "-c", script, repr(TEXTS[:3]), tmp_path / "b"], check=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_reserved_character_does_not_exclude_its_document(tmp_path):
    marked = [text.replace("self", "▅self") for text in TEXTS]
    assert train_tokenizer(marked, tmp_path / "model", vocab_size=400).vocab_size == 400


def test_long_corpora_are_sampled_evenly(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_TRAINING_CHARACTERS", len("".join(TEXTS)) // 3)
    train_tokenizer(TEXTS, tmp_path / "sampled", vocab_size=300)
    monkeypatch.undo()
    # The texts differ in length by a few characters, so a third of them takes every fourth.
    train_tokenizer(TEXTS[::4], tmp_path / "direct", vocab_size=300)
    assert (tmp_path / "sampled").read_bytes() == (tmp_path / "direct").read_bytes()


def test_a_text_that_cannot_be_read_is_told_as_such(tmp_path):
    class Texts(list):
        def __getitem__(self, i):
            if i == 1502:
                raise BadRecordError("a.jsonl:1503: is no JSON")
            return super().__getitem__(i)

    with pytest.raises(BadRecordError, match=r"^a\.jsonl:1503: is no JSON$"):
        train_tokenizer(Texts(["a text"] * 3000), tmp_path / "a.model", vocab_size=300)


def test_a_failed_write_leaves_no_file(tmp_path, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(training.epath.Path(tmp_path)), "replace", die)
    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(TEXTS, tmp_path / "model", vocab_size=400)
    assert not (tmp_path / "model").exists()


def test_a_vocabulary_beyond_the_models_is_refused(tokenizer):
    check_vocabulary(tokenizer, 400)
    with pytest.raises(ValueError, match=r"has 400 tokens but model\.vocab_size=399"):
        check_vocabulary(tokenizer, 399)


def test_half_of_a_surrogate_pair_is_refused_by_name(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": "cut \\ud83d"}\n')
    source = open_source("jsonl", f"{tmp_path}/a.jsonl")
    message = r"a\.jsonl:2: holds half of a surrogate pair, U\+D83D, at character 4"
    for kind in (tokenizer, load_tokenizer("bytes")):
        with pytest.raises(BadRecordError, match=message):
            tokenized(source[1], kind)
    with pytest.raises(BadRecordError, match=message):
        RecordTexts(source, on_error="raise")[1]
    assert [RecordTexts(source, on_error="skip")[i] for i in (0, 1)] == ["good", ""]


def test_too_little_text_is_refused_with_the_size_it_allows(tmp_path):
    with pytest.raises(
        ValueError, match=r"too little text .*=4096: they yield \d+ tokens"
    ) as error:
        train_tokenizer(TEXTS[:1], tmp_path / "model", vocab_size=4096)
    allowed = int(str(error.value).split("model.vocab_size=")[1].split()[0])
    assert train_tokenizer(TEXTS[:1], tmp_path / "m", vocab_size=allowed).vocab_size == allowed


def test_a_vocabulary_smaller_than_the_bytes_is_refused_with_the_least(tmp_path):
    with pytest.raises(ValueError, match=r"vocab_size=100 is too small .* or more") as error:
        train_tokenizer(TEXTS, tmp_path / "model", vocab_size=100)
    least = int(str(error.value).split("model.vocab_size to ")[1].split()[0])
    assert train_tokenizer(TEXTS, tmp_path / "model", vocab_size=least).vocab_size == least


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_no_text_is_refused(tmp_path, texts):
    with pytest.raises(ValueError, match="hold no text to train a tokenizer on"):
        train_tokenizer(texts, tmp_path / "model", vocab_size=400)


def test_another_kind_of_file_is_refused(tmp_path):
    (tmp_path / "model").write_text("not a model")
    with pytest.raises(ValueError, match="model is not a SentencePiece model"):
        SentencePieceTokenizer(tmp_path / "model")


def test_a_model_without_bos_is_refused(tmp_path):
    with open(tmp_path / "model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS),
            model_writer=file,
            model_type="bpe",
            vocab_size=80,
            bos_id=-1,
            minloglevel=2,
        )
    with pytest.raises(ValueError, match="has bos_id=-1"):
        SentencePieceTokenizer(tmp_path / "model")


THEIR_TEXTS = [
    "",
    " ",
    "a  b\n\n",
    "日本語🎉 e\u0301",
    "<|im_start|>user\n<think>x</think>",
    TEXTS[0],
]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A Hugging Face directory's tokenizer, and transformers' own of the same file."""
    path = make_tokenizer_json(tmp_path_factory.mktemp("theirs"))
    return HuggingFaceTokenizer(path), PreTrainedTokenizerFast(tokenizer_file=str(path))


@pytest.mark.parametrize("text", THEIR_TEXTS)
def test_tokens_of_a_tokenizer_json_are_those_of_transformers(theirs, text):
    ours, reference = theirs
    assert ours.encode(text, parse_special=True) == reference.encode(text)
    as_text = reference.encode(text, split_special_tokens=True)
    assert ours.encode(text) == as_text
    assert ours.decode(as_text) == text
    specials = [ours.bos_id, *as_text, ours.eos_id]
    assert ours.decode(specials) == reference.decode(specials, skip_special_tokens=True) == text


def test_special_tokens_written_in_text_are_parsed_only_when_asked(theirs):
    ours = theirs[0]
    assert ours.eos_id not in ours.encode("<|im_end|>")
    assert ours.encode("<|im_end|>", parse_special=True) == [ours.eos_id]
    # A token that was added without being special is one either way, as for transformers.
    assert ours.encode("<think>") == ours.encode("<think>", parse_special=True)
    assert ours.decode(ours.encode("<think>")) == "<think>"


def test_all_ids_are_below_the_vocabulary_s_size_and_others_decode_to_nothing(theirs):
    ours = theirs[0]
    assert max(ours.encode("</think>")) == ours.vocab_size - 1  # added last
    assert ours.decode([*ours.encode("a"), ours.vocab_size, 151_935]) == "a"
    with pytest.raises(ValueError, match=f"has {ours.vocab_size} tokens but model"):
        check_vocabulary(ours, 100)


def write(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_bos_and_eos_are_those_of_the_first_file_that_names_them(tmp_path):
    path = make_tokenizer_json(tmp_path)  # eos_token <|im_end|> 2, bos_token null, as Qwen's
    write(
        tmp_path,
        generation_config={"bos_token_id": 0, "eos_token_id": [2, 10**6, 0]},  # one of no token
        config={"bos_token_id": 7, "eos_token_id": 7},
    )
    tokenizer = HuggingFaceTokenizer(path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (0, 2, (2, 0))
    assert tokenizer.adds_bos is False
    assert encode_prompt(tokenizer, "a") == tokenizer.encode("a")
    assert encode_prompt(tokenizer, "") == [0]  # BOS all the same: a model needs a token to begin
    assert tokenizer.special_tokens == {"eos_token": "<|im_end|>"}

    bos = {"content": "<|im_start|>", "special": True}
    write(tmp_path, tokenizer_config={"bos_token": bos, "add_bos_token": True})
    tokenizer = HuggingFaceTokenizer(path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (1, 2, (2, 0))
    assert tokenizer.adds_bos is True
    assert encode_prompt(tokenizer, "a") == [1, *tokenizer.encode("a")]
    assert encode_prompt(tokenizer, "") == [1]

    for name in ("tokenizer_config", "generation_config"):
        (tmp_path / f"{name}.json").unlink()
    tokenizer = HuggingFaceTokenizer(path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (7, 7, (7,))
    # Without a generation_config.json texts end where config.json says, as in transformers.
    write(tmp_path, config={"bos_token_id": 7, "eos_token_id": [7, 0]})
    assert HuggingFaceTokenizer(path).stop_ids == (7, 0)
    # A work directory's config.json has sections.
    write(tmp_path, config={"model": {"bos_token_id": 5, "eos_token_id": 6}})
    tokenizer = HuggingFaceTokenizer(path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (5, 6)


def test_all_special_tokens_that_the_config_names_are_there_for_templates(tmp_path):
    path = make_tokenizer_json(tmp_path)
    named = {"sep_token": "|", "mask_token": {"content": "<m>"}, "cls_token": None}
    extra = {"im_start": "<|im_start|>"}
    write(tmp_path, tokenizer_config={"eos_token": "a", "extra_special_tokens": extra, **named})
    got = HuggingFaceTokenizer(path).special_tokens
    assert got == {"eos_token": "a", "sep_token": "|", "mask_token": "<m>", **extra}
    write(tmp_path, tokenizer_config={"eos_token": "a", "extra_special_tokens": ["<|im_start|>"]})
    assert HuggingFaceTokenizer(path).special_tokens == {"eos_token": "a"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"generation_config\.json is no JSON: Expecting value"),
        ("[1]", r"generation_config\.json holds a list; expected a JSON object"),
        ('{"eos_token_id": "2"}', "eos_token_id='2' must be the id of a token or a list of ids"),
        ('{"eos_token_id": [2.0]}', r"eos_token_id=\[2\.0\] must be"),
    ],
)
def test_a_damaged_file_beside_the_tokenizer_is_named(content, message, tmp_path):
    path = make_tokenizer_json(tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        HuggingFaceTokenizer(path)


def test_where_nothing_names_a_bos_the_eos_is_both(tmp_path):
    tokenizer = HuggingFaceTokenizer(make_tokenizer_json(tmp_path))
    assert tokenizer.bos_id == tokenizer.eos_id == 2


def test_a_tokenizer_json_without_or_with_an_unknown_eos_is_refused(tmp_path):
    path = make_tokenizer_json(tmp_path, eos_token=None)
    with pytest.raises(ValueError, match=r"names the EOS token; expected tokenizer_config\.json"):
        HuggingFaceTokenizer(path)
    make_tokenizer_json(tmp_path, eos_token="</s>")
    with pytest.raises(ValueError, match="lacks the eos_token '</s>'"):
        HuggingFaceTokenizer(path)
    make_tokenizer_json(tmp_path, eos_token=None)
    write(tmp_path, config={"eos_token_id": 99999})
    with pytest.raises(ValueError, match=r"lacks the eos_token_id=99999 .* in \[0, 2\d\d\)"):
        HuggingFaceTokenizer(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"is not a tokenizer\.json"):
        HuggingFaceTokenizer(path)


def test_padding_and_truncation_stored_in_the_file_are_not_applied(tmp_path):
    path = make_tokenizer_json(tmp_path)
    content = json.loads(path.read_text())
    content["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    path.write_text(json.dumps(content))
    tokenizer = HuggingFaceTokenizer(path)
    assert tokenizer.decode(tokenizer.encode("a long text")) == "a long text"


def test_a_tokenizer_is_found_by_file_or_by_directory(tmp_path):
    run, model = tmp_path / "run", tmp_path / "model"
    train_tokenizer(TEXTS, run / "tokenizer.model", vocab_size=400)
    write(run, config={"model": {}, "data": {"tokenizer": ""}})
    (run / "checkpoints" / "300").mkdir(parents=True)
    for path in (run, run / "tokenizer.model", run / "checkpoints" / "300"):
        assert load_tokenizer(path).vocab_size == 400
    file = make_tokenizer_json(model)
    for path in (model, file, str(model)):
        assert isinstance(load_tokenizer(path), HuggingFaceTokenizer)
    # A run keeps a copy of its own; one that has none was trained with what its config names.
    for named in (file, model):
        write(run, config={"model": {}, "data": {"tokenizer": str(named)}})
        assert not isinstance(load_tokenizer(run), HuggingFaceTokenizer)
        (tmp_path / "bare").mkdir(exist_ok=True)
        write(tmp_path / "bare", config={"model": {}, "data": {"tokenizer": str(named)}})
        assert isinstance(load_tokenizer(tmp_path / "bare"), HuggingFaceTokenizer)
    write(tmp_path / "bare", config={"model": {}, "data": {"tokenizer": "bytes"}})
    assert load_tokenizer(tmp_path / "bare").encode("é") == load_tokenizer("bytes").encode("é")


@pytest.mark.parametrize("config", [{}, {"bos_token": "<|endoftext|>"}])
def test_a_kept_tokenizer_is_the_same_wherever_its_tokens_were_named(config, tmp_path):
    path = make_tokenizer_json(tmp_path / "model", **config)
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages }}")
    described = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    write(
        tmp_path / "model",
        config={"eos_token_id": 2, "bos_token_id": 0},
        generation_config={"eos_token_id": [2, 0]},
    )
    for told in (described, {k: v for k, v in described.items() if k[1:] != "os_token"}):
        write(tmp_path / "model", tokenizer_config=told)
        tokenizer = load_tokenizer(path)
        copy = tmp_path / f"copy {len(told)}"
        for _ in range(2):
            keep_tokenizer(tokenizer, copy)
            kept = load_tokenizer(copy)
            assert fingerprint(kept) == fingerprint(tokenizer)
            assert kept.stop_ids == tokenizer.stop_ids
            assert kept.chat_template == "{{ messages }}"
        (copy / "tokenizer_config.json").unlink()  # damaged by whoever
        keep_tokenizer(tokenizer, copy)
        assert fingerprint(load_tokenizer(copy)) == fingerprint(tokenizer)
    other = tmp_path / "other.jinja"
    other.write_text("{{ 1 }}")
    changed = load_tokenizer(path, chat_template=other)
    with pytest.raises(ValueError, match=r"chat_template\.jinja is another than that of"):
        keep_tokenizer(changed, copy)
    keep_tokenizer(changed, tmp_path / "new")
    assert load_tokenizer(tmp_path / "new").chat_template == "{{ 1 }}"
    with pytest.raises(ValueError, match=r"tokenizer\.json is another than that of .*some\.model"):
        keep_tokenizer(train_tokenizer(TEXTS[:3], tmp_path / "some.model", vocab_size=300), copy)


@pytest.mark.parametrize("name", ["bos_token", "eos_token"])
def test_the_same_file_with_another_bos_or_eos_is_another_tokenizer(name, tmp_path):
    named = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    one, other = (
        load_tokenizer(make_tokenizer_json(tmp_path / folder, **config))
        for folder, config in (("one", named), ("other", {**named, name: "<|im_start|>"}))
    )
    assert one.path.read_bytes() == other.path.read_bytes()
    assert fingerprint(one) != fingerprint(other)


def test_a_tokenizer_with_several_chat_templates_is_kept_for_texts(tmp_path):
    several = [{"name": "rag", "template": "{{ messages }}"}, {"name": "tools", "template": ""}]
    path = make_tokenizer_json(tmp_path / "model", chat_template=several)
    keep_tokenizer(HuggingFaceTokenizer(path), tmp_path / "run")
    assert not (tmp_path / "run" / "chat_template.jinja").exists()
    with pytest.raises(ValueError, match="no chat template 'default'; choose from"):
        _ = load_tokenizer(tmp_path / "run").chat_template


def test_texts_end_where_a_run_has_taught_its_model_to_end(tmp_path, caplog):
    tokenizer = load_tokenizer(make_tokenizer_json(tmp_path / "base", eos_token="<|endoftext|>"))
    (tmp_path / "base" / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    chat = {"messages": [{"role": r, "content": "x"} for r in ("user", "assistant")]}
    (tmp_path / "chats.jsonl").write_text((json.dumps(chat) + "\n") * 20)
    (tmp_path / "text.jsonl").write_text('{"text": "x"}\n' * 20)
    for name, field, ends in (("chats", "messages", (0, 2)), ("text", "text", (0,))):
        data = load_data(
            source="jsonl",
            path=f"{tmp_path}/{name}.jsonl",
            field=field,
            vocab_size=300,
            tokenizer=str(tmp_path / "base"),
            trained_tokenizer=tmp_path / "unused",
            holdout_fraction=0.5,
        )
        for _ in range(2):
            keep_tokenizer(data.tokenizer, tmp_path / name, ends=data.ends())
        assert load_tokenizer(tmp_path / name).stop_ids == ends
    assert tokenizer.stop_ids == (0,)
    assert not caplog.records
    # Other engines stop at what generation_config.json or else config.json names, and at no other.
    edited = load_tokenizer(make_tokenizer_json(tmp_path / "edited"))  # with <|im_end|> as EOS
    for i, (named, ends) in enumerate((([], [2]), ([0], [2, 0]), ([0, 2], [0, 2]))):
        write(tmp_path / "edited", generation_config={"eos_token_id": named})
        keep_tokenizer(load_tokenizer(edited.path), tmp_path / f"copy{i}", ends=[2])
        written = json.loads((tmp_path / f"copy{i}" / "generation_config.json").read_text())
        assert written["eos_token_id"] == ends
    # transformers does not look into config.json where there is a generation_config.json.
    write(tmp_path / "edited", generation_config={"temperature": 0.7}, config={"eos_token_id": 2})
    keep_tokenizer(load_tokenizer(edited.path), tmp_path / "warm", ends=[2])
    written = json.loads((tmp_path / "warm" / "generation_config.json").read_text())
    assert written == {"temperature": 0.7, "eos_token_id": [2]}
    # To a tokenizer without that mark it is text as any other.
    data = load_data(
        source="jsonl",
        path=f"{tmp_path}/chats.jsonl",
        field="messages",
        vocab_size=300,
        tokenizer="bytes",
        chat_template=str(tmp_path / "base" / "chat_template.jinja"),
        trained_tokenizer=tmp_path / "unused",
        holdout_fraction=0.5,
    )
    assert data.ends() == []
    assert "ends with 'im_end|>', which is no special token" in caplog.text


def test_a_sentencepiece_model_is_kept_and_has_a_template_only_where_one_is_given(tmp_path):
    tokenizer = train_tokenizer(TEXTS[:3], tmp_path / "some.model", vocab_size=300)
    with pytest.raises(FileNotFoundError, match="holds no chat template"):
        _ = tokenizer.chat_template
    keep_tokenizer(tokenizer, tmp_path / "copy")
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["tokenizer.model"]
    assert fingerprint(load_tokenizer(tmp_path / "copy")) == fingerprint(tokenizer)


def test_where_no_tokenizer_is_the_error_says_what_was_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected tokenizer\.json or tokenizer\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nothing does not exist; expected a Sentence"):
        load_tokenizer(tmp_path / "nothing")
    (tmp_path / "vocab.txt").write_text("a")
    with pytest.raises(
        ValueError, match=r"vocab\.txt is not a SentencePiece model; expected .* or a tok"
    ):
        load_tokenizer(tmp_path / "vocab.txt")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer\.json: "):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "a  b\n", "日本語🎉 e\u0301", "<|eos|>", "\0\ufeff\r\n", TEXTS[0]]
)
def test_bytes_are_the_bytes_of_the_text(text):
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode([256, *text.encode(), 257]) == text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (256, 257, 258)
    assert tokenizer.encode("a<|eos|>", parse_special=True) == [97, 257]
