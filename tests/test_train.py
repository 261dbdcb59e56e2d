"""`python train.py` as a user types it."""

import json
import os
import pathlib
import re
import subprocess
import sys
import traceback

import corpora
import jax.numpy as jnp
import pytest
from corpora import make_texts

from configs import tiny
from qwen3next_jax import command
from qwen3next_jax.checkpoint.load import load_checkpoint
from qwen3next_jax.command import friendly_errors
from qwen3next_jax.config import RunConfig
from qwen3next_jax.data.tokenizer import load_tokenizer
from qwen3next_jax.inference.decode import Generation, generate
from qwen3next_jax.training.workdir import workdir_lock

ROOT = pathlib.Path(__file__).parents[1]


def train(*arguments, workdir):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, ROOT / "train.py", f"--workdir={workdir}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_a_mistyped_key_is_refused_before_anything_else(tmp_path):
    result = train("--config.train.num_stepz=3", workdir=tmp_path / "run")
    assert result.returncode != 0
    assert "error: The config has no key" in result.stderr
    assert 'Did you mean "num_steps" instead of "num_stepz"?' in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()
    result = train("--config.data.mixture.web.weight=3", workdir=tmp_path / "run")  # two missing
    assert "error: The config has no key web" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_bucket_is_no_work_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = train(workdir="gs://bucket/run")
    assert result.returncode == 1
    assert "--workdir=gs://bucket/run is no path of a mounted file system" in result.stderr
    assert not os.listdir(tmp_path)


def test_a_mistake_is_told_without_a_traceback_and_a_bug_with_one(tmp_path, capsys):
    with pytest.raises(SystemExit) as end, friendly_errors():
        RunConfig.from_dict({"trian": {}})
    assert str(end.value).startswith(
        "error: The run cannot start:\n  Unknown keys in config: 'trian'"
    )
    with pytest.raises(ValueError, match="could not convert"), friendly_errors():
        float("x")
    beside = pathlib.Path(command.__file__).parents[1] / "jax" / "core.py"
    for file, ours in ((command.__file__, True), (ROOT / "train.py", True), (beside, False)):
        frame = traceback.FrameSummary(str(file), 1, "f", line="raise ValueError('x')")
        assert command.is_ours(frame) is ours
    result = train(
        "--config.train.num_steps=0",
        "--config.train.gradient_accumulation_steps=3",
        workdir=tmp_path / "run",
    )
    assert result.returncode == 1
    first, second = map(str.strip, result.stderr.strip().splitlines()[-2:])
    assert first == "train.num_steps=0 must be at least 1"
    assert second.startswith("train.global_batch_size=8 is not divisible by")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["train.py", "eval.py"])
def test_help_answers_at_once_and_under_a_profiler(command, tmp_path):
    profile = tmp_path / "profile"
    run = subprocess.run(
        [
            sys.executable,
            "-X",
            "importtime",
            "-m",
            "cProfile",
            "-o",
            profile,
            ROOT / command,
            "--help",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"},
    )
    assert "--workdir" in run.stdout
    # Options of the interpreter outlive the new start for the sake of large pages.
    assert profile.exists()
    imported = {line.rsplit("|")[-1].strip() for line in run.stderr.splitlines()}
    assert "absl.flags" in imported
    assert not imported & {"jax", "flax", "orbax.checkpoint"}


@pytest.mark.parametrize(("stopped", "code"), [(True, 7), (False, 0)])
def test_a_run_that_was_stopped_ends_with_the_code_asked_for(stopped, code):
    program = f"import train; train.run = lambda *_: {stopped}; train.app.run(train.main)"
    result = subprocess.run(
        [sys.executable, "-c", program, "--stopped_exit_code=7"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert result.returncode == code


def test_weights_are_not_paired_with_a_new_tokenizer(tmp_path):
    result = train(f"--config.train.initial_checkpoint={tmp_path}", workdir=tmp_path / "run")
    assert result.returncode == 1
    assert f"give theirs, as --config.data.tokenizer={tmp_path}" in result.stderr


def test_a_refused_run_changes_nothing_in_the_directory(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_next"}')
    result = train(workdir=tmp_path)
    assert result.returncode == 1
    assert f"error: {tmp_path / 'config.json'} is not a run's" in result.stderr
    assert os.listdir(tmp_path) == ["config.json"]

    config = RunConfig.from_dict(tiny.get_config().to_dict())
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    (tmp_path / "tokenizer.model").write_text("of the run that holds the directory")
    with workdir_lock(tmp_path):
        result = train("--config.model.vocab_size=300", workdir=tmp_path)
    assert result.returncode == 1
    assert "Another process is training in" in result.stderr
    assert (tmp_path / "tokenizer.model").read_text() == "of the run that holds the directory"


def test_a_prompt_without_room_for_its_sample_is_refused_at_the_start(tmp_path):
    result = train(
        "--config.train.sample_tokens=4090",
        "--config.train.sample_prompts=('too long a text',)",
        "--config.data.tokenizer=bytes",
        workdir=tmp_path,
    )
    assert result.returncode == 1
    assert "The sample prompt 'too long a text' of 16 tokens and" in result.stderr


def test_suites_that_chat_need_a_template_at_the_start(tmp_path):
    result = train(
        "--config.evaluation.suites=('long_context',)",
        "--config.evaluation.chat=True",
        "--config.data.tokenizer=bytes",
        workdir=tmp_path,
    )
    assert result.returncode == 1
    assert "chat_template" in result.stderr
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_run_without_prompts_ends_well(tmp_path):
    result = train(
        "--config.train.num_steps=1",
        "--config.train.sample_prompts=()",
        "--config.train.sequence_length=64",
        "--config.data.tokenizer=bytes",
        workdir=tmp_path,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_the_tiny_model_writes_python_better_than_gzip_packs_it(tmp_path):
    result = train(workdir=tmp_path)
    assert result.returncode == 0, result.stderr
    bits, gzip_bits = map(
        float,
        re.search(r"([\d.]+) bits per byte \(gzip -9: ([\d.]+)\)", result.stderr).groups(),
    )
    assert bits < gzip_bits
    assert "What the model writes by itself:" in result.stdout
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert abs(last["eval_bits_per_byte"] - bits) < 1e-4
    assert list((tmp_path / "tensorboard").iterdir())
    speculation_keeps_the_greedy_text_and_many_drafts(tmp_path)

    again = train(workdir=tmp_path)
    assert again.returncode == 0
    assert "is finished: 300 steps" in again.stdout
    more = train("--config.train.num_steps=302", workdir=tmp_path)
    assert more.returncode == 0, more.stderr
    assert "Going on from the checkpoint of step 300" in more.stderr
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "loss" in x][-2:] == [300, 302]


def speculation_keeps_the_greedy_text_and_many_drafts(workdir):
    model = load_checkpoint(workdir)
    tokenizer = load_tokenizer(workdir)
    texts = ["def ", "import os\n\n\nclass ", "        if not "]
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]
    plain = generate(model, prompts, max_new_tokens=100, speculative=False)
    for drafts in (1, 3):
        generation = Generation(model, prompts, max_new_tokens=100, speculative=drafts)
        new = [[] for _ in prompts]
        for parts in generation:
            for row, more in zip(new, parts, strict=True):
                row += more
        # A useful share of the first drafts; 44% to 60% were seen.
        assert generation.accepted[0] > 0.3 * generation.drafted[0]
        for prompt, want, got in zip(prompts, plain, new, strict=True):
            if got != want:  # which only a tie between the two best tokens excuses
                place = next(i for i, (a, b) in enumerate(zip(want, got, strict=True)) if a != b)
                logits = model(jnp.asarray([prompt + want[:place]]))[0, -1]
                best, second = jnp.sort(logits)[::-1][:2]
                assert best - second < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "packing"),
    [*zip([*corpora.WRITTEN, "synthetic"], ["concatenate", "best_fit"] * 4, strict=True)],
)
def test_every_source_trains_by_values_of_the_config_alone(kind, packing, tmp_path):
    given = {"source": "synthetic"}
    if kind != "synthetic":
        given = corpora.write(kind, tmp_path / "corpus", make_texts(60))
    values = {**given, "tokenizer": "bytes", "packing": packing, "too_long": "truncate"}
    if kind == "synthetic":
        values["holdout_fraction"] = 1e-4
    result = train(
        *(f"--config.data.{key}={value}" for key, value in values.items()),
        "--config.train.num_steps=2",
        "--config.train.sequence_length=64",
        "--config.train.sample_tokens=0",
        "--config.model.num_hidden_layers=1",
        "--config.model.full_attention_interval=1",
        "--config.model.mtp_steps=0",
        workdir=tmp_path / "run",
    )
    assert result.returncode == 0, result.stderr
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[1][f"{given['source']}/tokens"] == lines[1]["tokens"] > 0
    assert lines[-1]["eval_bits_per_byte"] > 0


@pytest.mark.slow
def test_a_profile_is_written_for_the_steps_asked_for(tmp_path):
    result = train(
        "--config.train.num_steps=3",
        "--config.train.profile_steps=(2, 3)",
        "--config.train.sequence_length=64",
        "--config.train.sample_tokens=0",
        workdir=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
