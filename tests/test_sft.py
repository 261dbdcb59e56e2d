"""Fine-tuning from a Hugging Face directory to another one, as a user types it."""

import json
import os
import pathlib
import subprocess
import sys

import hf_directory
import numpy as np
import pytest
import torch
from hf_tokenizer import make_tokenizer_json
from transformers import PreTrainedTokenizerFast, Qwen3NextForCausalLM

import qwen3next_jax as q3n
from configs import sft
from qwen3next_jax.config import RunConfig
from qwen3next_jax.convert import to_hf

ROOT = pathlib.Path(__file__).parents[1]
TEMPLATE = ROOT / "tests" / "chat_templates" / "chatml.jinja"
WORDS = ["red", "green", "blue", "white"]


def chat(i):
    """Two questions at random, each with the one answer that belongs to it."""
    rng = np.random.default_rng(i)
    turns = []
    for word in rng.choice(WORDS, 2):
        noise = "".join(rng.choice(list("abcdefghij"), 6))
        turns += [
            {"role": "user", "content": f"{word} {noise}"},
            {"role": "assistant", "content": word.upper()},
        ]
    return turns


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A released model's files, of random weights."""
    folder = tmp_path_factory.mktemp("model") / "hf"
    hf_directory.released(folder, name="chat")
    make_tokenizer_json(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE.read_text())
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    return folder


def train(directory, *arguments):
    command = [sys.executable, ROOT / "train.py", f"--config=configs/sft.py:{directory}"]
    return subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )


def losses(directory, chats):
    """Nats a token of answers and of all else, by transformers: weights, tokens and mask."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    model = Qwen3NextForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    sums = {True: [], False: []}
    for messages in chats:
        encoded = tokenizer.apply_chat_template(
            messages,
            chat_template=TEMPLATE.read_text(),
            return_dict=True,
            return_assistant_tokens_mask=True,
            return_tensors="pt",
        )
        ids, mask = encoded["input_ids"], np.asarray(encoded["assistant_masks"]).reshape(-1)
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        each = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").numpy()
        for answer in sums:
            sums[answer] += each[mask[1:] == answer].tolist()
    return np.mean(sums[True]), np.mean(sums[False])


def test_the_runs_model_is_the_directorys(directory):
    config = sft.get_config(str(directory))
    config.data.path = "chats.jsonl"
    run = RunConfig.from_dict(config.to_dict())
    model = q3n.load_hf(directory).config
    assert model.mtp_steps == 1  # which only the tensors' names tell
    assert run.model == model
    assert run.model.extra == model.extra != {}
    # As it is kept with the run, and read when that goes on.
    kept = json.loads(json.dumps(run.to_dict()))
    assert RunConfig.from_dict(kept).model.extra == model.extra
    run.check_resumable_from(kept)


@pytest.mark.parametrize("slashes", [("", "/"), ("/", "")])
def test_a_slash_behind_the_directory_makes_no_other_run(slashes, directory):
    def run(directory):
        config = sft.get_config(directory)
        config.data.path = "chats.jsonl"
        return RunConfig.from_dict(config.to_dict())

    was, now = (run(f"{directory}{slash}") for slash in slashes)
    now.check_resumable_from(was.to_dict())
    with pytest.raises(ValueError, match=r"train\.initial_checkpoint: was"):
        run(f"{directory}/../{directory.name}").check_resumable_from(was.to_dict())


@pytest.mark.parametrize(
    ("given", "message"),
    [("", "Which model"), (":nowhere", "nowhere does not exist"), (":.", "is no checkpoint")],
)
def test_a_wrong_directory_is_told_in_a_line(given, message, tmp_path):
    command = [
        sys.executable, str(ROOT / "train.py"), f"--config={ROOT}/configs/sft.py{given}",
        "--config.data.path=a.jsonl",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.slow
def test_answers_are_learnt_and_what_belongs_to_the_model_travels(directory, tmp_path):
    chats = [chat(i) for i in range(200)]
    (tmp_path / "chats.jsonl").write_text(
        "\n".join(json.dumps({"messages": messages}) for messages in chats)
    )
    run = tmp_path / "run"
    arguments = [
        f"--workdir={run}", f"--config.data.path={tmp_path}/chats.jsonl",
        "--config.train.num_steps=40", "--config.train.global_batch_size=8",
        "--config.train.sequence_length=160", "--config.train.log_every=1",
        "--config.train.eval_every=0", "--config.optimizer.learning_rate=5e-3",
        "--config.optimizer.warmup_steps=5", "--config.precision.compute=float32",
        "--config.data.holdout_fraction=0.1", "--config.train.remat=none",
    ]  # fmt: skip
    result = train(directory, *arguments)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    course = [x["ce"] for x in lines if "ce" in x]
    assert course[-1] < course[0] / 2

    exported = tmp_path / "exported"
    to_hf(run, exported)
    unseen = [chat(i) for i in range(1000, 1010)]
    answers, rest = (
        np.array(x) for x in zip(*(losses(d, unseen) for d in (directory, exported)), strict=True)
    )
    assert answers[1] < answers[0] / 2
    # Nothing was asked of the model there; learnt, it would be below two nats by now.
    assert rest[1] > rest[0] * 0.7

    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ):
        assert (exported / name).read_bytes() == (directory / name).read_bytes(), name
    before, after = (json.loads((d / "config.json").read_text()) for d in (directory, exported))
    assert q3n.ModelConfig.from_hf(before) == q3n.ModelConfig.from_hf(after)
    assert after["architectures"] == ["Qwen3NextForCausalLM"]
    kept = before.keys() - {"architectures", "dtype", "rope_parameters", "layer_types"}
    assert {key: before[key] for key in kept} == {key: after.get(key) for key in kept}
    assert hf_directory.read(exported).keys() == hf_directory.read(directory).keys()  # with MTP's

    # The same command goes on, here to its end: the run is finished.
    again = train(directory, *arguments)
    assert "is finished: 40 steps" in again.stdout, again.stderr


def test_without_a_directory_the_config_asks_for_one(tmp_path):
    result = subprocess.run(
        [sys.executable, ROOT / "train.py", "--config=configs/sft.py", f"--workdir={tmp_path}/x"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert result.returncode != 0
    assert "Give its directory: --config=configs/sft.py:DIR" in result.stderr


def test_a_run_is_named_after_its_config_and_not_after_what_that_is_given(directory, tmp_path):
    result = subprocess.run(
        [
            sys.executable,
            ROOT / "train.py",
            f"--config={ROOT}/configs/sft.py:{directory}/",
            "--config.data.path=/nowhere/*.jsonl",
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert result.returncode == 1
    assert "/nowhere" in result.stderr
    assert os.listdir(tmp_path / "runs") == ["sft"]
