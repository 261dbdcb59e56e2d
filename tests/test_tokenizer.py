"""The tokenizer loses nothing, depends on the texts only, and is refused where it cannot serve."""

import random
import subprocess
import sys

import pytest
import sentencepiece

from qwen3next_jax.data import tokenizer as tokenizer_module
from qwen3next_jax.data.tokenizer import SentencePieceTokenizer, check_vocabulary, train_tokenizer

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
        "", " ", "  leading", "trailing \n", "\t\ttabs\tand spaces  ", "CRLF\r\n\r\n", "\n\n\n",
        "▁", " ▁ ▁▁", "a▁b é▁é", "▅", "\0", "a\0b", "<s></s><unk><0x41>", "\ufeffBOM",
        "e\u0301 ﬁ ① Ａ", "\u3000\xa0\u2028", "日本語🎉👩‍👩‍👧", TEXTS[0],
    ],
)  # fmt: skip
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
        "import sys; from qwen3next_jax.data.tokenizer import train_tokenizer as train;"
        "train(eval(sys.argv[1]), sys.argv[2], vocab_size=300)"
    )
    train_tokenizer(TEXTS[:3], tmp_path / "a", vocab_size=300)
    subprocess.run([sys.executable, "-c", script, repr(TEXTS[:3]), tmp_path / "b"], check=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_reserved_character_does_not_exclude_its_document(tmp_path):
    marked = [text.replace("self", "▅self") for text in TEXTS]
    assert train_tokenizer(marked, tmp_path / "model", vocab_size=400).vocab_size == 400


def test_long_corpora_are_sampled_evenly(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "_TRAINING_CHARACTERS", len("".join(TEXTS)) // 3)
    train_tokenizer(TEXTS, tmp_path / "sampled", vocab_size=300)
    monkeypatch.undo()
    # The texts differ in length by a few characters, so a third of them takes every fourth.
    train_tokenizer(TEXTS[::4], tmp_path / "direct", vocab_size=300)
    assert (tmp_path / "sampled").read_bytes() == (tmp_path / "direct").read_bytes()


def test_a_failed_write_leaves_no_file(tmp_path, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(tokenizer_module.epath.Path(tmp_path)), "replace", die)
    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(TEXTS, tmp_path / "model", vocab_size=400)
    assert not (tmp_path / "model").exists()


def test_a_vocabulary_beyond_the_models_is_refused(tokenizer):
    check_vocabulary(tokenizer, 400)
    with pytest.raises(ValueError, match=r"has 400 tokens but model\.vocab_size=399"):
        check_vocabulary(tokenizer, 399)


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
            sentence_iterator=iter(TEXTS), model_writer=file, model_type="bpe", vocab_size=80,
            bos_id=-1, minloglevel=2,
        )  # fmt: skip
    with pytest.raises(ValueError, match="has bos_id=-1"):
        SentencePieceTokenizer(tmp_path / "model")
