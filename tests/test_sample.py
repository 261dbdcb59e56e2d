"""`python -m qwen3next_jax.sample`: text to stdout as it comes, what is said about it to stderr."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from absl import app, flags
from absl.testing import flagsaver
from hf_tokenizer import CHATML, make_tokenizer_json
from oracles import SMALL, random_model, small_config
from safetensors.numpy import save_file

from qwen3next_jax import sample
from qwen3next_jax.config import ModelConfig
from qwen3next_jax.data.tokenizer import HuggingFaceTokenizer, split_stops
from qwen3next_jax.data.train_tokenizer import train_tokenizer
from qwen3next_jax.inference.decode import Generation

YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}


@pytest.fixture
def hf_directory(tmp_path):
    """A Hugging Face directory without weights: config.json, tokenizer, chat template."""
    folder = tmp_path / "model"
    make_tokenizer_json(folder)
    (folder / "config.json").write_text(json.dumps({**SMALL, "vocab_size": 300}))
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 0, "eos_token_id": [2, 0]})
    )
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


@pytest.fixture
def with_mtp(hf_directory):
    """The same of a model that can draft, by the names of its weights."""
    save_file({"mtp.norm.weight": np.zeros(1, np.float32)}, hf_directory / "model.safetensors")
    return hf_directory


@pytest.fixture
def our_directory(tmp_path):
    """A work directory without checkpoints."""
    train_tokenizer(["def f(x): return x\n" * 9], tmp_path / "tokenizer.model", vocab_size=280)
    model = {**SMALL, "vocab_size": 300}
    (tmp_path / "config.json").write_text(json.dumps({"model": model, "data": {"tokenizer": ""}}))
    (tmp_path / "checkpoints" / "300").mkdir(parents=True)
    return tmp_path


@dataclasses.dataclass
class Script:
    """What stands in for a model: the text it writes, and what it was asked for."""

    items: list  # each a list of every row's new tokens
    asked: dict = dataclasses.field(default_factory=dict)
    stopped: list = dataclasses.field(default_factory=list)
    shown: list = dataclasses.field(default_factory=list)  # stdout before each item
    drafted: tuple = ()
    accepted: tuple = ()


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command on a script; returns what it wrote to stdout and to stderr."""

    def run(script, *arguments):
        class Scripted(Generation):
            passes = 3
            drafted, accepted = script.drafted, script.accepted

            def __init__(self, model, prompts, **options):
                script.asked.update(options, prompts=prompts)

            def __iter__(self):
                for item in script.items:
                    script.shown.append(capsys.readouterr().out)
                    yield item

            def stop(self, row):
                script.stopped.append(row)

        def load_checkpoint(path, *, dtype, mesh, rope_scaling, unstacked):
            assert unstacked  # or the parameters would be in memory twice
            script.asked.update(path=path, dtype=dtype, mesh=mesh, rope_scaling=rope_scaling)
            config = small_config(rope_scaling=rope_scaling)
            return type("Model", (), {"config": config})()

        monkeypatch.setattr(sample, "load_checkpoint", load_checkpoint)
        monkeypatch.setattr(sample, "Generation", Scripted)
        with flagsaver.flagsaver():
            sample.main(flags.FLAGS(["sample", *map(str, arguments)]))
        rest, err = capsys.readouterr()
        return "".join([*script.shown, rest]), err

    return run


def test_a_single_text_is_shown_as_it_comes_in_whole_characters(hf_directory, run):
    tokenizer = HuggingFaceTokenizer(hf_directory / "tokenizer.json")
    tokens = tokenizer.encode("a 日 b")
    assert len(tokens) == 7
    script = Script([[[token]] for token in tokens])
    out, err = run(script, f"--checkpoint={hf_directory}", "--prompt=x")
    assert out == "a 日 b\n"
    assert script.shown == ["", "a", " ", "", "", "日", " "]
    assert "7 tokens, the first after" in err
    assert "tokens/s" in err
    assert "drafts" not in err


def test_the_options_reach_the_generation_and_the_model(with_mtp, run):
    script = Script([])
    run(
        script,
        f"--checkpoint={with_mtp}",
        "--prompt=ab",
        "--max_new_tokens=5",
        "--temperature=0.5",
        "--top_k=7",
        "--top_p=0.9",
        "--min_p=0.1",
        "--repetition_penalty=1.1",
        "--seed=3",
        "--drafts=4",
        "--dtype=bfloat16",
    )
    tokens = HuggingFaceTokenizer(with_mtp / "tokenizer.json").encode("ab")
    assert script.asked == dict(
        prompts=[tokens],
        max_new_tokens=5,
        temperature=0.5,
        top_k=7,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.1,
        seed=3,
        speculative=4,
        stop_tokens=(2, 0),
        path=with_mtp,
        dtype="bfloat16",
        mesh=None,
        rope_scaling=None,
    )


@pytest.mark.parametrize(
    ("arguments", "speculative"),
    [((), None), (("--speculative",), True), (("--nospeculative",), False), (("--drafts=1",), 1)],
)
def test_speculation_is_left_to_the_model_asked_for_or_forbidden(
    with_mtp, run, arguments, speculative
):
    script = Script([])
    run(script, f"--checkpoint={with_mtp}", *arguments)
    assert script.asked["speculative"] is speculative or speculative == 1


def test_acceptance_is_said_by_position(hf_directory, run):
    script = Script([[[5]], [[5] * 6]], drafted=(3, 4, 0), accepted=(3, 1, 0))
    _, err = run(script, f"--checkpoint={hf_directory}")
    assert "2.00 tokens a pass" in err
    assert "drafts accepted, by position: 100% of 3, 25% of 4, none drafted" in err


def test_text_ends_before_a_stop_string_and_the_row_is_stopped(hf_directory, run):
    encode = HuggingFaceTokenizer(hf_directory / "tokenizer.json").encode
    script = Script([[encode("one tw")], [encode("o three")], [encode("four")]])
    arguments = (f"--checkpoint={hf_directory}", "--stop=zzz", "--stop=two")
    out, _ = run(script, *arguments)
    assert out == "one \n"
    assert script.shown[1] == "one "  # "tw" might be the beginning of the stop string
    assert script.stopped == [0]


def test_a_stop_string_may_be_a_special_token(hf_directory, run):
    script = Script([])
    run(script, f"--checkpoint={hf_directory}", "--stop=<|im_start|>", "--stop=two")
    assert script.asked["stop_tokens"] == (2, 0, 1)


def test_a_stop_string_of_a_special_token_and_more_is_refused(hf_directory):
    tokenizer = HuggingFaceTokenizer(hf_directory / "tokenizer.json")
    with pytest.raises(ValueError, match=r"'<\|im_start\|>user' holds a special token and"):
        split_stops(tokenizer, ["two", "<|im_start|>user"])


def test_a_chat_has_the_template_beside_the_tokenizer(hf_directory, run, tmp_path):
    make_tokenizer_json(tmp_path / "other")
    (tmp_path / "other" / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    script = Script([])
    run(
        script,
        f"--checkpoint={hf_directory}",
        f"--tokenizer={tmp_path / 'other'}",
        "--chat",
        "--prompt=x",
    )
    tokenizer = HuggingFaceTokenizer(hf_directory / "tokenizer.json")
    assert script.asked["prompts"] == [tokenizer.encode("x!")]


def test_what_only_began_like_a_stop_string_is_shown_at_the_end(hf_directory, run):
    encode = HuggingFaceTokenizer(hf_directory / "tokenizer.json").encode
    script = Script([[encode("one tw")]])
    assert run(script, f"--checkpoint={hf_directory}", "--stop=two")[0] == "one tw\n"
    assert script.stopped == []


@pytest.mark.parametrize("prompts", [["--prompt=x"], ["--prompt=x", "--prompt=y"]])
def test_a_reader_that_has_had_enough_ends_the_text_quietly(
    hf_directory, run, monkeypatch, prompts
):
    read, write = os.pipe()
    os.close(read)
    row = HuggingFaceTokenizer(hf_directory / "tokenizer.json").encode("some text")
    with os.fdopen(write, "w") as pipe:  # which is flushed when it closes, as stdout is at exit
        monkeypatch.setattr(sys, "stdout", pipe)
        run(Script([[row] * len(prompts)]), f"--checkpoint={hf_directory}", *prompts)


def test_several_prompts_are_rows_of_a_batch_and_come_one_after_the_other(hf_directory, run):
    encode = HuggingFaceTokenizer(hf_directory / "tokenizer.json").encode
    script = Script([[encode("A"), encode("B")], [encode("a stop"), encode("b")]])
    arguments = (f"--checkpoint={hf_directory}", "--prompt=x", "--prompt=yz", "--stop=stop")
    out, _ = run(script, *arguments)
    assert script.asked["prompts"] == [encode("x"), encode("yz")]
    assert out == "=== 1 ===\nAa \n=== 2 ===\nBb\n"
    assert script.stopped == [0]


def test_prompts_of_our_own_models_begin_with_bos_and_others_as_their_files_say(
    our_directory, hf_directory, run
):
    def prompt(*arguments):
        script = Script([])
        run(script, *arguments)
        return script.asked["prompts"][0]

    for path in (our_directory, our_directory / "checkpoints" / "300"):
        assert prompt(f"--checkpoint={path}", "--prompt=a")[0] == 1
        assert len(prompt(f"--checkpoint={path}", "--prompt=a")) == 2
    assert len(prompt(f"--checkpoint={hf_directory}", "--prompt=a")) == 1
    assert prompt(f"--checkpoint={hf_directory}") == [0]  # an empty one: BOS alone
    make_tokenizer_json(hf_directory, add_bos_token=True)
    assert prompt(f"--checkpoint={hf_directory}", "--prompt=a")[0] == 0
    assert prompt(f"--checkpoint={hf_directory}", f"--tokenizer={our_directory}")[0] == 1


def test_a_chat_is_the_template_s_text_with_its_tokens_parsed(hf_directory, run):
    script = Script([])
    run(script, f"--checkpoint={hf_directory}", "--chat", "--system=Be brief.", "--prompt=Who?")
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    question = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    tokenizer = HuggingFaceTokenizer(hf_directory / "tokenizer.json")
    assert script.asked["prompts"] == [tokenizer.encode(system + question, parse_special=True)]
    run(script, f"--checkpoint={hf_directory}", "--chat", "--prompt=Who?")
    assert script.asked["prompts"] == [tokenizer.encode(question, parse_special=True)]


def test_yarn_is_given_over_the_original_context(hf_directory, our_directory, run):
    script = Script([])
    run(script, f"--checkpoint={hf_directory}", "--yarn_factor=4")
    original = SMALL["max_position_embeddings"]
    want = {**YARN, "factor": 4.0, "original_max_position_embeddings": original}
    assert script.asked["rope_scaling"] == want
    run(script, f"--checkpoint={our_directory}", "--yarn_factor=4")
    assert script.asked["rope_scaling"] == want
    # Where a config has YaRN already, the original context is the one that it names.
    (hf_directory / "config.json").write_text(
        json.dumps({**SMALL, "vocab_size": 300, "rope_scaling": YARN})
    )
    run(script, f"--checkpoint={hf_directory}", "--yarn_factor=3")
    assert script.asked["rope_scaling"] == {**YARN, "factor": 3.0}


def test_parameters_can_be_split_over_all_devices(hf_directory, run):
    script = Script([])
    run(script, f"--checkpoint={hf_directory}", "--mesh_fsdp=-1")
    assert script.asked["mesh"].shape["fsdp"] == len(script.asked["mesh"].devices.flat)
    with pytest.raises(SystemExit, match=r"error: --mesh_fsdp=99: there are \d+ devices; give"):
        run(script, f"--checkpoint={hf_directory}", "--mesh_fsdp=99")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Give --checkpoint=DIR"),
        (("--checkpoint=x", "some", "text"), r"Unexpected arguments \['some', 'text'\]; give text"),
        (("--checkpoint=x", "--system=Be brief."), "give --chat as well"),
        (("--checkpoint=x", "--nospeculative", "--drafts=2"), "--nospeculative contradicts"),
    ],
)
def test_flags_that_make_no_sense_are_refused(run, arguments, message):
    with pytest.raises(app.UsageError, match=message):
        run(Script([]), *arguments)


def test_a_tokenizer_of_another_model_is_refused_before_the_model_is_read(hf_directory, run):
    (hf_directory / "config.json").write_text(json.dumps(SMALL))
    script = Script([])
    with pytest.raises(SystemExit, match=r"error: .* but model\.vocab_size=61"):
        run(script, f"--checkpoint={hf_directory}")
    assert not script.asked


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt=" + "x" * SMALL["max_position_embeddings"],), r"Prompt 0 of \d+ tokens and 64"),
        (("--max_new_tokens=1000", "--yarn_factor=1.5"), r"exceed the model's context of"),
        (("--top_p=0", "--temperature=1"), r"top_p=0\.0 must lie in \(0, 1\]"),
        (("--repetition_penalty=0",), r"repetition_penalty=0\.0 must be above 0"),
        (("--stop=",), "A stop string is empty"),
        (("--drafts=2",), "speculative=2 needs an MTP module"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_model_is_read(
    hf_directory, run, arguments, message
):
    script = Script([])
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        run(script, f"--checkpoint={hf_directory}", *arguments)
    assert not script.asked


def test_the_command_writes_what_generate_does(hf_directory):
    import qwen3next_jax as q3n
    from qwen3next_jax.checkpoint.hugging_face import save_hf

    given = {**SMALL, "vocab_size": 300, "mtp_steps": 1}
    model = random_model(ModelConfig.from_hf(given), scale=0.3)
    weights = hf_directory.parent / "with_weights"
    save_hf(model, weights)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (weights / name).write_bytes((hf_directory / name).read_bytes())
    tokenizer = HuggingFaceTokenizer(weights / "tokenizer.json")
    new = q3n.generate(
        model, [tokenizer.encode("def f")], max_new_tokens=12, stop_tokens=tokenizer.stop_ids
    )
    command = [
        sys.executable, "-m", "qwen3next_jax.sample", f"--checkpoint={weights}",
        "--prompt=def f", "--max_new_tokens=12", "--speculative", "--yarn_factor=1",
    ]  # fmt: skip
    root = pathlib.Path(__file__).parents[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, capture_output=True, cwd=root, env=environment, check=False)
    assert result.returncode == 0, result.stderr.decode()
    assert result.stdout.decode() == tokenizer.decode(new[0]) + "\n"
    err = result.stderr.decode()
    assert f"{len(new[0])} tokens, the first after" in err
    assert "drafts accepted, by position: " in err
    assert "YaRN with factor 1 over the original 512" in err
