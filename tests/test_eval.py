"""`eval.py` runs each suite on what a run leaves behind; suites in training leave no trace."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import types

import corpora
import oracles
import pytest
from hf_directory import released
from hf_tokenizer import make_tokenizer_json
from small_run import run, small_config, write_corpus

from qwen3next_jax.config import EvaluationConfig
from qwen3next_jax.data.corpus import Data, load_data
from qwen3next_jax.data.prepare import Job, make_shard, prepare
from qwen3next_jax.data.sources import Record
from qwen3next_jax.data.tokenizer import load_tokenizer
from qwen3next_jax.evaluation import suites
from qwen3next_jax.evaluation.evaluator import Evaluator
from qwen3next_jax.evaluation.suites import (
    check_suites,
    check_usable,
    run_suite,
    scalars,
    suites_in_training,
    table,
)

ROOT = pathlib.Path(__file__).parent.parent
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512}


def evaluate(*arguments):
    return subprocess.run(
        [sys.executable, "eval.py", *map(str, arguments)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


def test_unknown_suites_come_with_the_nearest_known_ones():
    with pytest.raises(ValueError, match=r"'perplexty' \(did you mean 'perplexity'"):
        check_suites(["perplexty"], EvaluationConfig())
    with pytest.raises(ValueError, match=r"evaluation.suites: 'perplexty' \(did you mean 'perpl"):
        small_config("nowhere", evaluation__suites=("perplexty",))
    with pytest.raises(ValueError, match=r"'vt' \(expected one of niah_single"):
        check_suites(["long_context"], EvaluationConfig(long_context_tasks=("vt",)))


@pytest.mark.parametrize(
    ("suite", "options", "changes", "message"),
    [
        ("lm_eval", {"chat": True}, {}, "no chat template"),
        ("speculation", {}, {}, r"speculation needs an MTP module"),
        ("speculation", {}, {"mtp_steps": 1}, "No document of texts has more than 64 tokens"),
        ("perplexity", {"length": 513}, {}, "length=513 exceeds the model's context"),
        (
            "speculation",
            {},
            {"mtp_steps": 1, "max_position_embeddings": 127},
            "reads and writes 128",
        ),
        ("long_context", {"lengths": (512, 32)}, {}, "does not fit into the .* answer leaves"),
        ("long_context", {"lengths": (512, 1025)}, {"rope_scaling": YARN}, "1025 exceeds the cont"),
    ],
)
def test_what_does_not_fit_a_model_is_found_by_its_config(suite, options, changes, message):
    options = EvaluationConfig(**options)
    config, tokenizer = oracles.small_config(**changes), load_tokenizer("bytes")
    check_usable([], options, config, tokenizer, {})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check_usable([suite], options, config, tokenizer, {"texts": [Record(name="a", text="a")]})


def test_suites_that_do_not_chat_need_no_chat_template():
    config, tokenizer = oracles.small_config(), load_tokenizer("bytes")
    check_usable(["perplexity"], EvaluationConfig(chat=True), config, tokenizer, {})


@pytest.fixture
def given(monkeypatch):
    """What suites are given, which compute nothing."""
    found = {}

    def tell(*_, **options):
        found.update(options)
        return {}

    harness = types.SimpleNamespace(run_tasks=tell, check_tasks=lambda *_: None)
    monkeypatch.setattr(suites, "_harness", lambda: harness)
    for suite in ("speculation", "long_context", "document_perplexity"):
        monkeypatch.setattr(suites, suite, tell)
    return found


@pytest.fixture
def evaluator():
    return Evaluator(oracles.random_model(oracles.small_config()), load_tokenizer("bytes"))


def test_speculation_gets_its_drafts_and_as_many_prompts_as_the_limit(given, evaluator):
    run_suite("speculation", evaluator, EvaluationConfig(drafts=4, limit=3), {})
    assert (given["drafts"], given["prompts"]) == (4, 3)


@pytest.mark.parametrize(("asked", "handed_over"), [(-1, None), (0, 0), (5, 5)])
def test_no_examples_are_other_than_as_many_as_a_task_says(asked, handed_over, given, evaluator):
    options = EvaluationConfig(tasks=("a task",), num_fewshot=asked)
    run_suite("lm_eval", evaluator, options, {})
    assert given["num_fewshot"] == handed_over


def test_lm_eval_gets_all_that_is_asked_of_it(given, evaluator):
    asked = dict(include_path="folder", chat=True, limit=3, confirm_run_unsafe_code=True, seed=7)
    run_suite("lm_eval", evaluator, EvaluationConfig(tasks=("a task",), **asked), {})
    assert given == {**asked, "num_fewshot": None}


def test_long_context_gets_all_that_is_asked_of_it(given, evaluator):
    asked = dict(lengths=(512,), depths=3, chat=True, seed=7)
    options = EvaluationConfig(long_context_tasks=("niah_single",), limit=2, **asked)
    run_suite("long_context", evaluator, options, {})
    assert given == {**asked, "tasks": ("niah_single",), "samples": 2}


def test_perplexity_gets_all_that_is_asked_of_it(given, evaluator):
    run_suite("perplexity", evaluator, EvaluationConfig(length=9, limit=2), {}, on_error="skip")
    assert given == {"length": 9, "limit": 2, "on_error": "skip"}


def test_suites_in_training_skip_what_the_run_skips(given, evaluator, monkeypatch):
    for name, nothing in (("table", ""), ("scalars", {})):
        monkeypatch.setattr(suites, name, lambda *_, nothing=nothing: nothing)
    data = Data(train=[], held_out=[], tokenizer=evaluator.tokenizer, on_error="skip")
    suites_in_training(EvaluationConfig(suites=("perplexity",)), data)(evaluator.model)
    assert given["on_error"] == "skip"


def test_scalars_count_the_drafts_from_one():
    found = {"acceptance": [0.5, 0.25], "tokens_per_pass": 1.75, "drafted": 4, "domains": {}}
    assert scalars("speculation", found) == {
        "acceptance_1": 0.5,
        "acceptance_2": 0.25,
        "tokens_per_pass": 1.75,
        "drafted": 4,
    }


def test_a_table_names_the_last_length_of_each_range():
    part = {"documents": 1, "tokens": 5, "ce": 1.0, "bits_per_byte": 2.0}
    ranges = {
        "by_length": [{**part, "from": 4, "to": 8}],
        "by_position": [{"from": 2, "to": 4, "tokens": 2, "ce": 1.0}],
    }
    names = [line.split("  ")[0] for line in table("perplexity", {**part, **ranges}).splitlines()]
    assert names[2:] == ["all", "documents of 4–7", "tokens behind 2–3"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two runs of one course, the second with suites every three steps."""
    folder = tmp_path_factory.mktemp("runs")
    corpus = write_corpus(folder / "corpus")
    options = {
        "suites": ("perplexity", "long_context", "speculation"), "every": 3, "limit": 2,
        "long_context_tasks": ("niah_single",), "lengths": (512, 8192), "depths": 2,
    }  # fmt: skip
    for name in ("plain", "suites"):
        changes = {f"evaluation__{k}": v for k, v in options.items() if name == "suites"}
        run(small_config(corpus, train__sample_tokens=0, **changes), folder / name)
    return folder


def lines(workdir):
    return [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_suites_in_training_change_no_loss_and_write_their_lines(trained):
    plain, suites = (lines(trained / name) for name in ("plain", "suites"))
    names = ("loss", "grad_norm", "ce", "mtp_ce", "eval_ce")
    course = [
        [[x["step"], *(x.get(n) for n in names)] for x in run if "loss" in x or "eval_ce" in x]
        for run in (plain, suites)
    ]
    assert course[0] == course[1]
    found = [x for x in suites if "eval_perplexity_ce" in x]
    assert [x["step"] for x in found] == [3, 6, 8]
    for line in found:
        assert line["eval_perplexity_bits_per_byte"] > 0
        assert 0 <= line["eval_speculation_acceptance_1"] <= 1
        assert line["eval_speculation_tokens_per_pass"] >= 1
        cells = line["eval_long_context_cells"]
        assert [(c["task"], c["length"], c["depth"]) for c in cells] == [
            ("niah_single", n, d) for n in (512, 8192) for d in (0, 1)
        ]
        assert all(0 <= c["score"] <= 1 for c in cells)


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["perplexity", "long_context", "speculation", "lm_eval"])
def test_the_command_evaluates_a_run_and_writes_all_it_knows(trained, suite, tmp_path):
    from local_tasks import write_tasks

    write_tasks(tmp_path / "tasks")
    output = tmp_path / "out.json"
    options = {
        "perplexity": [],
        "long_context": ["--tasks=niah_single", "--lengths=512", "--depths=2", "--limit=1"],
        "speculation": ["--limit=2", "--data=stdlib", "--data=synthetic"],
        "lm_eval": ["--tasks=local_choice", f"--include_path={tmp_path / 'tasks'}", "--limit=2"],
    }[suite]
    result = evaluate(
        f"--workdir={trained / 'plain'}", f"--suite={suite}", f"--output={output}", *options
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(output.read_text())
    assert report["suite"] == suite
    assert report["checkpoint"] == str(trained / "plain")
    assert report["config"]["model"]["hidden_size"] == 32
    assert report["seeds"] == {"seed": 1234}
    assert {"python", "jax"} <= report["versions"].keys()
    if suite == "perplexity":
        # One document a row, but few are cut: close to what the loop says of packed rows.
        said = lines(trained / "plain")[-1]["eval_ce"]
        assert abs(report["results"]["ce"] - said) < 0.1 * said
        assert "documents of" in result.stdout
    elif suite == "long_context":
        assert [c["depth"] for c in report["cells"]] == [0, 1]
        assert result.stdout.splitlines()[0].split() == ["task", "depth", "512"]
    elif suite == "speculation":
        assert set(report["results"]["domains"]) == {"stdlib", "synthetic"}
    else:
        assert 0 <= report["results"]["tasks"]["local_choice"]["acc"] <= 1


@pytest.mark.slow
def test_texts_that_are_no_longer_what_the_run_held_out_are_told(trained, tmp_path):
    told = "'text' are not those that the run began with: it may have been trained on some"
    shutil.copytree(trained / "plain", tmp_path / "run")
    shutil.copytree(trained / "corpus", tmp_path / "corpus")
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace(f"{trained / 'corpus'}", f"{tmp_path / 'corpus'}"))
    arguments = f"--workdir={tmp_path / 'run'}", "--suite=perplexity"
    result = evaluate(*arguments)
    assert result.returncode == 0, result.stderr
    assert told not in result.stderr
    (tmp_path / "corpus" / "new.txt").write_text("one more\n")
    result = evaluate(*arguments)
    assert result.returncode == 0, result.stderr
    assert told in result.stderr


@pytest.mark.slow
def test_the_command_says_what_it_lacks(trained, tmp_path):
    workdir = trained / "plain"
    for arguments, message in (
        ([], "Give either --workdir=DIR or --checkpoint=DIR"),
        ([f"--workdir={workdir}", "--suite=lm_evil"], "did you mean 'lm_eval'?"),
        ([f"--workdir={workdir}", "--suite=lm_eval"], "lm_eval needs tasks"),
        ([f"--workdir={tmp_path}", "--suite=perplexity"], "is no checkpoint"),
    ):
        result = evaluate(*arguments)
        assert result.returncode != 0
        assert message in result.stderr + result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--suite=perplexity", "--data=stdlib", "--output=."), "error: . is a directory; name a"),
        (("--suite=long_context", "--lengths=512,32"), "give lengths greater by at"),
        (
            ("--suite=long_context", "--length=512"),
            "--length has no effect on --suite=long_context; it is for perplexity",
        ),
        (
            ("--suite=perplexity", "--seed=7"),
            "--seed has no effect on --suite=perplexity; it is for lm_eval and long_context",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_model_is_read(tmp_path, arguments, message):
    checkpoint = tmp_path / "checkpoint"
    released(checkpoint, name="chat", shards=1)
    make_tokenizer_json(checkpoint)
    os.truncate(checkpoint / "model.safetensors", 99)  # reading it is another error
    result = evaluate(f"--checkpoint={checkpoint}", *arguments)
    assert result.returncode == 1
    assert message in result.stderr


def run_with_flags(code, *flags):
    """Runs code after eval.py has read its flags; in its own process, as commands' flags clash."""
    read = f"import json, sys, eval\neval.flags.FLAGS(sys.argv)\n{code}"
    command = [sys.executable, "-c", read, *flags]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True)


def printed(code, *flags):
    """What code prints after eval.py has read its flags, as JSON."""
    run = run_with_flags(code, *flags)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_every_flag_is_the_option_of_its_name():
    asked = dict(
        batch_size=3, limit=7, seed=9, length=100, tasks=["a", "b"], include_path="folder",
        num_fewshot=2, confirm_run_unsafe_code=True, lengths=[512, 640], depths=3, drafts=4,
        chat=True,
    )  # fmt: skip
    names = {"tasks": "a,b", "lengths": "512,640"}
    flags = [f"--{name}={names.get(name, value)}" for name, value in asked.items()]
    code = "print(json.dumps(eval.dataclasses.asdict(eval._options())))"
    in_training = {"suites": [], "every": 0}
    own = {"tasks": ["a", "b"], "long_context_tasks": []}
    assert printed(code, "--suite=lm_eval", *flags) == {**asked, **own, **in_training}
    own = {"tasks": [], "long_context_tasks": ["a", "b"]}
    assert printed(code, "--suite=long_context", *flags) == {**asked, **own, **in_training}


@pytest.mark.slow
def test_flags_of_the_model_and_of_the_texts_reach_them(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    released(checkpoint, name="chat", shards=1)
    make_tokenizer_json(tmp_path / "other")
    code = (
        "import types\n"
        "from qwen3next_jax.checkpoint import load\n"
        "from qwen3next_jax.data import sources\n"
        "from qwen3next_jax.evaluation import evaluator, suites\n"
        "found = {}\n"
        "def tell(name, result=None):\n"
        "    def told(*_, **given): found.update({name: given}); return result\n"
        "    return told\n"
        "load.load_checkpoint = tell('model')\n"
        "sources.open_source = tell('texts', [])\n"
        "evaluator.Evaluator = lambda _, tokenizer, **given: (\n"
        "    found.update(tokenizer=str(tokenizer.path), evaluator=given))\n"
        "suites.run_suite, suites.table = tell('suite', {}), lambda *_: ''\n"
        "eval._evaluate('perplexity')\n"
        "print(json.dumps(found))"
    )
    found = printed(
        code,
        f"--checkpoint={checkpoint}",
        "--suite=perplexity",
        "--data=tfds:wiki#body",
        "--split=test",
        f"--tokenizer={tmp_path / 'other'}",
        "--dtype=bfloat16",
        "--batch_size=3",
    )
    assert found == {
        "model": {"dtype": "bfloat16", "mesh": None},
        "texts": {"field": "body", "split": "test"},
        "tokenizer": str(tmp_path / "other" / "tokenizer.json"),
        "evaluator": {"batch_size": 3},
        "suite": {"on_error": "raise"},
    }


def domains(*given):
    """What eval.py makes of --data."""
    code = (
        "from qwen3next_jax.data.tokenizer import load_tokenizer\n"
        "found = eval._domains({}, None, 300, load_tokenizer('bytes'))\n"
        "print([x[0].text for x in found.values()])"
    )
    return run_with_flags(code, *(f"--data={x}" for x in given))


def test_texts_are_named_with_their_field_which_may_be_none(tmp_path):
    corpora.write("array_record", tmp_path / "texts", ["a text", "another"])
    (tmp_path / "a.jsonl").write_text('{"text": "one", "code": "two"}\n')
    given = [
        f"array_record:{tmp_path}/texts/*.array_record#",
        f"jsonl:{tmp_path}/a.jsonl",
        f"jsonl:{tmp_path}/a.jsonl#code",
    ]
    found = domains(*given)
    assert found.stdout == "['a text', 'one', 'two']\n", found.stderr


def test_texts_that_cannot_be_what_was_meant_are_refused(tmp_path):
    assert "takes no path" in domains("stdlib:/corpus").stderr
    make_tokenizer_json(tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text("a text of another tokenizer")
    job = Job(
        source="text",
        path=f"{tmp_path}/*.txt",
        tokenizer=f"{tmp_path}/tokenizer",
        output=f"{tmp_path}/prepared",
    )
    prepare(job, lambda job, shards, done: [done(make_shard(job, k)) for k in shards])
    refused = domains(f"prepared:{tmp_path}/prepared")
    assert "was prepared with another tokenizer than" in refused.stderr


def test_held_out_records_are_told_by_the_part_of_the_mixture(tmp_path):
    for name in ("a", "b"):
        write_corpus(tmp_path / name)
    data = load_data(
        source="mixture",
        mixture={
            name: {"weight": 1.0, "source": "text", "path": f"{tmp_path / name}/*.txt"}
            for name in ("a", "b")
        },
        tokenizer="bytes",
        holdout_fraction=0.5,
        vocab_size=258,
        trained_tokenizer=tmp_path / "none",
    )
    parts = data.held_out_parts
    assert list(parts) == ["a", "b"]
    assert sum(map(len, parts.values())) == len(data.held_out) > 0
