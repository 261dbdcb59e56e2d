"""Text comes as early as it is certain, and in sum is what decoding all the tokens gives."""

import random

import pytest
import sentencepiece
from hf_tokenizer import make_tokenizer_json

from qwen3next_jax.data.text_stream import TextStream
from qwen3next_jax.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer
from qwen3next_jax.data.train_tokenizer import train_tokenizer

TEXT = "naïve 日本語🎉 ends here.\n\nA second one."


@pytest.fixture(scope="module", params=["sentencepiece", "tokenizer.json"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "sentencepiece":
        return train_tokenizer(["def f(x): return x\n" * 9], folder / "model", vocab_size=280)
    return HuggingFaceTokenizer(make_tokenizer_json(folder))


def one_by_one(stream, tokens):
    pieces = [stream.feed([token]) for token in tokens]
    return [*pieces, stream.finish()]


def test_the_pieces_are_whole_characters_and_together_the_text(tokenizer):
    tokens = tokenizer.encode(TEXT)
    assert len(tokens) > len(TEXT)  # or no character would be split
    stream = TextStream(tokenizer)
    pieces = one_by_one(stream, tokens)
    assert "".join(pieces) == stream.text == TEXT
    assert "\ufffd" not in "".join(pieces)
    assert pieces[-1] == ""  # nothing was held back without need
    assert sum(map(bool, pieces)) > len(TEXT) / 2  # nor came at the end only


def test_a_tokenizer_that_drops_the_first_space_keeps_all_the_others(tmp_path):
    with open(tmp_path / "model", "wb") as file:  # with its defaults, SentencePiece makes such ones
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["one two three one two three"] * 9),
            model_writer=file,
            model_type="bpe",
            vocab_size=30,
            minloglevel=2,
        )
    tokenizer = SentencePieceTokenizer(tmp_path / "model")
    rng = random.Random(2)
    for _ in range(500):
        tokens = rng.choices(range(tokenizer.vocab_size), k=8)
        tokens[rng.randrange(8)] = tokenizer.bos_id  # without text
        assert "".join(one_by_one(TextStream(tokenizer), tokens)) == tokenizer.decode(tokens)
    (space,) = (
        i
        for i in range(tokenizer.vocab_size)
        if tokenizer.decode([3, i]) == tokenizer.decode([3]) + " "
    )
    for _ in range(50):
        runs = [
            [rng.randrange(tokenizer.vocab_size)] + [space] * rng.randrange(99) for _ in range(4)
        ]
        tokens = sum(runs, [space] * rng.choice([0, 50]))
        assert "".join(one_by_one(TextStream(tokenizer), tokens)) == tokenizer.decode(tokens)


def test_any_tokens_become_what_decoding_them_at_once_gives(tokenizer):
    # Halves of characters, special tokens and ids beyond the vocabulary among them.
    rng = random.Random(0)
    for _ in range(500):
        tokens = rng.choices(range(tokenizer.vocab_size + 3), k=rng.randrange(1, 30))
        assert "".join(one_by_one(TextStream(tokenizer), tokens)) == tokenizer.decode(tokens)


def test_a_long_run_of_spaces_is_not_decoded_again_and_again(tokenizer, monkeypatch):
    decode, longest = tokenizer.decode, 0

    def counted(tokens):
        nonlocal longest
        longest = max(longest, len(tokens))
        return decode(tokens)

    for before in ("", "a", "日"):
        tokens = [*tokenizer.encode(before), *tokenizer.encode("\n") * 500, *tokenizer.encode(TEXT)]
        with monkeypatch.context() as patch:
            patch.setattr(type(tokenizer), "decode", lambda self, tokens: counted(tokens))
            assert "".join(one_by_one(TextStream(tokenizer), tokens)) == decode(tokens)
    assert longest < 60


def test_half_a_character_is_shown_at_the_end_only(tokenizer):
    tokens = tokenizer.encode("a日")
    stream = TextStream(tokenizer)
    assert stream.feed(tokens[:-1]) == "a"
    assert stream.finish() == tokenizer.decode(tokens[:-1])[1:]
    assert "\ufffd" in stream.text


def test_text_ends_exactly_before_the_stop_string(tokenizer):
    stream = TextStream(tokenizer, stop=["never", "re.\n\nA"])
    pieces = one_by_one(stream, tokenizer.encode(TEXT))
    assert stream.stopped
    assert "".join(pieces) == stream.text == "naïve 日本語🎉 ends he"


def test_of_stop_strings_that_are_complete_at_once_the_longest_wins(tokenizer):
    for stop in (["b", "ab"], ["ab", "b"]):
        stream = TextStream(tokenizer, stop=stop)
        one_by_one(stream, tokenizer.encode("xab"))
        assert stream.text == "x"


def test_of_stop_strings_that_are_complete_in_turn_the_first_wins(tokenizer):
    for stop in (["b", "abc"], ["abc", "b"]):
        stream = TextStream(tokenizer, stop=stop)
        stream.feed(tokenizer.encode("xabc"))
        assert stream.text == "xa"


def test_no_beginning_of_a_stop_string_is_let_out_before_it_is_certain(tokenizer):
    stream = TextStream(tokenizer, stop=["aab"])
    assert stream.feed(tokenizer.encode("xa")) == "x"
    assert stream.feed(tokenizer.encode("a")) == ""
    assert stream.feed(tokenizer.encode("a")) == "a"  # "aaa": two of them may still begin it
    assert not stream.stopped
    assert stream.feed(tokenizer.encode("b")) == ""
    assert stream.stopped
    assert stream.text == "xa"


def test_what_only_began_like_a_stop_string_comes_out_at_the_end(tokenizer):
    stream = TextStream(tokenizer, stop=["here.\n\nB"])
    assert "".join(one_by_one(stream, tokenizer.encode("ends here.\n\n"))) == "ends here.\n\n"
    assert not stream.stopped


def test_the_text_does_not_depend_on_how_tokens_are_handed_over(tokenizer):
    rng = random.Random(1)
    for _ in range(300):
        text = "".join(rng.choices("abé", k=12))
        stop = ["".join(rng.choices("abé", k=rng.randrange(1, 4))) for _ in range(3)]
        tokens = tokenizer.encode(text)
        singly, at_once = TextStream(tokenizer, stop), TextStream(tokenizer, stop)
        one_by_one(singly, tokens)
        at_once.feed(tokens)
        at_once.finish()
        assert (singly.text, singly.stopped) == (at_once.text, at_once.stopped)
        assert singly.stopped == any(s in text for s in stop)
        assert text.startswith(singly.text)
        assert not any(s in singly.text for s in stop)


def test_after_the_stop_string_nothing_comes(tokenizer):
    stream = TextStream(tokenizer, stop=["b"])
    assert stream.feed(tokenizer.encode("abc")) == "a"
    assert stream.feed(tokenizer.encode("d")) == stream.finish() == ""
    assert stream.text == "a"


def test_an_empty_stop_string_is_refused(tokenizer):
    with pytest.raises(ValueError, match="stop string is empty"):
        TextStream(tokenizer, stop=["", "x"])
