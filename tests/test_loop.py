"""A run can be stopped anywhere and goes on as if it had not been."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from launched import lines, start, virtual_devices
from small_run import is_time, run, small_config, write_corpus

from qwen3next_jax.config import RunConfig, flatten
from qwen3next_jax.data.tokenizer import encode_prompt, load_tokenizer
from qwen3next_jax.data.train_tokenizer import train_tokenizer
from qwen3next_jax.evaluation.samples import samples, samples_in_training
from qwen3next_jax.parallel.mesh import make_mesh
from qwen3next_jax.parallel.names import named_leaves
from qwen3next_jax.training import loop
from qwen3next_jax.training.environment import record_environment
from qwen3next_jax.training.optimizer import make_schedule

HERE = pathlib.Path(__file__).parent
# Keys of `train` that no step reads.
HOST_ONLY = (
    "checkpoint_every", "eval_every", "keep_best", "keep_checkpoints", "log_every",
    "profile_steps", "sample_every",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def shared_programs():
    """Runs whose steps compute the same share what they compile, and their first state.

    What stands on disk is all that a later run has of an earlier one: a program holds no values.
    """
    programs, states = {}, {}
    make_program, first_state = loop.make_program, loop._random_state

    def shared_program(config, mesh):
        key = flatten(config.to_dict())
        for name in list(key):
            section, _, rest = name.partition(".")
            if section in ("data", "evaluation") or rest in HOST_ONLY:
                del key[name]
        if config.optimizer.schedule == "constant":
            del key["train.num_steps"]
        key = json.dumps(key)
        if key not in programs:
            programs[key] = make_program(config, mesh)
        return programs[key]

    def shared_state(config, program):
        if id(program) not in states:
            states[id(program)] = first_state(config, program)
        return jax.tree.map(jnp.copy, states[id(program)])  # the first step consumes it

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_program", shared_program)
        patch.setattr(loop, "_random_state", shared_state)
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "texts")


def config_of(corpus, steps=8, **changes):
    """A rate that rises, then stays: however many the steps are, they are one program."""
    return small_config(
        corpus,
        train__num_steps=steps,
        optimizer__schedule="constant",
        optimizer__warmup_steps=6,
        **changes,
    )


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """A run that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("whole")
    model, steps = run(config_of(corpus), workdir)
    assert steps == 8
    return workdir, model


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A run of two steps."""
    workdir = tmp_path_factory.mktemp("finished")
    run(config_of(corpus, 2), workdir)
    return workdir


@pytest.fixture
def two_steps(finished, tmp_path):
    """A copy of that run."""
    return shutil.copytree(finished, tmp_path / "two_steps")


def course(workdir):
    """Metrics but for times, by step and kind of line."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not is_time(k)} for line in lines]


def of_the_model(line):
    """Its metrics but for the layers' own, which test_parallel.py compares after one step."""
    return [key for key in line if not key.startswith("layers/")]


def assert_same_model(a, b):
    for x, y in zip(jax.tree.leaves(nnx.state(a)), jax.tree.leaves(nnx.state(b)), strict=True):
        np.testing.assert_array_equal(x, y)


class Stop(Exception):
    pass


def stop_at(monkeypatch, step, *, change=None):
    """Makes the data raise at a step, or changes that step's batch."""
    original = loop.training_batches

    def training_batches(*args, **kwargs):
        batches = original(*args, **kwargs)

        class Stopping:
            # Counts from the restored position on, so that `step` is one of this call.
            count = 0
            get_state, set_state, close = batches.get_state, batches.set_state, batches.close

            def __next__(self):
                self.count += 1
                if self.count == step and change is None:
                    raise Stop
                batch = next(batches)
                return change(batch) if self.count == step else batch

        return Stopping()

    monkeypatch.setattr(loop, "training_batches", training_batches)


def test_metrics_have_what_the_docs_promise(whole):
    training = [line for line in course(whole[0]) if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, 9))
    config = RunConfig.from_dict(json.loads((whole[0] / "config.json").read_text()))
    schedule = make_schedule(config.optimizer, config.train.num_steps)
    for line in training:
        expected = {"loss", "ce", "mtp_ce", "balance_loss", "grad_norm", "learning_rate", "tokens"}
        assert expected <= line.keys()
        total = line["ce"] + 0.1 * line["mtp_ce"] + 1e-3 * line["balance_loss"]
        np.testing.assert_allclose(line["loss"], total, rtol=1e-6)
        assert len(line["layers/load_max"]) == 3  # two layers and the MTP module
        assert line["layers/decay_min"][0] <= line["layers/decay_max"][0]
        assert line["layers/attention_sink"][0] is line["layers/decay_mean"][1] is None
        assert 0 < line["update_ratio/delta"] < 1
        assert line["dropped_share"] == 0
        # The step compiles the schedule, and the last bit may differ.
        np.testing.assert_allclose(line["learning_rate"], schedule(line["step"] - 1), rtol=3e-7)
        assert {"text/epoch", "text/records", "text/tokens"} <= line.keys()
        filled = line["packing_efficiency"] * line["step"] * 8 * 48
        assert filled == pytest.approx(line["text/tokens"]) == pytest.approx(line["tokens"])
        assert line["skipped_records"] == line["truncated_records"] == line["skipped_files"] == 0
    lines = map(json.loads, (whole[0] / "metrics.jsonl").read_text().splitlines())
    assert all(0 <= line["data_wait"] <= 1 for line in lines if "loss" in line)
    assert training[-1]["loss"] < training[0]["loss"]
    assert {"eval_ce", "eval_bits_per_byte"} <= course(whole[0])[-1].keys()
    environment = (whole[0] / "environment.jsonl").read_text().splitlines()
    assert [json.loads(line)["jax"] for line in environment] == [jax.__version__]


def test_the_first_and_the_last_step_are_logged_whatever_lies_between(corpus, tmp_path):
    run(config_of(corpus, 4, train__log_every=3), tmp_path)
    assert [line["step"] for line in course(tmp_path) if "loss" in line] == [1, 3, 4]


def test_a_run_that_ends_within_its_warm_up_says_so(corpus, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(loop.logging, "warning", lambda text, *args: said.append(text % args))
    run(config_of(corpus, 1), tmp_path)
    assert any("optimizer.warmup_steps=6, and train.num_steps=1" in line for line in said)


def test_the_data_are_in_the_order_of_the_run_s_seed(corpus, tmp_path, monkeypatch):
    def batches(*_, seed, **__):
        raise InterruptedError(f"asked for seed {seed}")

    monkeypatch.setattr(loop, "training_batches", batches)
    with pytest.raises(InterruptedError, match="asked for seed 7"):
        run(config_of(corpus, 1, train__seed=7), tmp_path)


def test_a_sample_and_its_prompt_may_fill_the_context(corpus):
    tokenizer, model = load_tokenizer("bytes"), config_of(corpus, 1).model
    room = model.context_length - len(encode_prompt(tokenizer, "ab"))
    asked = [
        config_of(corpus, 1, train__sample_prompts=("ab",), train__sample_tokens=n).train
        for n in (room, room + 1)
    ]
    assert samples_in_training(asked[0], model, tokenizer) is not None
    with pytest.raises(ValueError, match=r"The sample prompt 'ab' of . tokens and"):
        samples_in_training(asked[1], model, tokenizer)


def test_the_checkpoint_of_the_best_evaluation_is_kept_beside_the_newest(corpus, tmp_path):
    keeping = dict(train__keep_checkpoints=1, train__keep_best=1)
    config = config_of(corpus, 3, train__checkpoint_every=1, train__eval_every=1, **keeping)
    worse = iter((1.0, np.float32(2), jnp.float32(3)))
    run(config, tmp_path, evaluate=lambda model: {"eval_ce": next(worse)})
    kept = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert sorted(name for name in kept if name.isdigit()) == ["1", "3"]


def test_evaluations_multiply_in_the_config_s_precision(corpus, tmp_path):
    seen = []

    def evaluate(model):
        seen.append(jax.config.jax_default_matmul_precision)
        return {"eval_ce": 1.0}

    config = config_of(corpus, 1)
    run(config, tmp_path, evaluate=evaluate)
    assert seen == [config.precision.matmul]


def test_half_a_line_of_a_start_on_a_full_disk_is_cut_off(tmp_path):
    file = tmp_path / "environment.jsonl"
    file.write_text('{"step": 1}\n{"step": 2, "ti')
    record_environment(tmp_path, make_mesh(small_config(tmp_path).mesh), start_step=3)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 3]


def test_samples_and_reports_come_at_their_steps_and_change_no_loss(whole, corpus, tmp_path):
    tokenizer = load_tokenizer("bytes")
    shown, reported = [], []

    def sample(model):
        text = samples(model, tokenizer, ["", "ab"], max_new_tokens=3, seed=0)
        shown.append(text)
        return text

    def report():
        written = (tmp_path / "metrics.jsonl").read_text().splitlines()
        reported.append(json.loads(written[-1])["step"])

    run(config_of(corpus, train__sample_every=5), tmp_path, sample=sample, report=report)
    assert course(tmp_path) == course(whole[0])
    assert reported == [3, 6, 8]  # checkpoints, and the end
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["prompt"]) for line in lines] == [
        (5, ""),
        (5, "ab"),
        (8, ""),
        (8, "ab"),
    ]
    assert [line["text"] for line in lines] == [x["text"] for text in shown for x in text]


def test_a_run_stopped_between_checkpoints_ends_with_the_same_losses(
    whole, corpus, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        stop_at(patch, 6)  # the last checkpoint is of step 3; metrics go to step 4 or 5
        with pytest.raises(Stop):
            run(config_of(corpus), tmp_path)
    model, steps = run(config_of(corpus), tmp_path)
    assert steps == 5
    assert course(tmp_path) == course(whole[0])
    assert_same_model(model, whole[1])


def test_a_finished_run_is_left_alone_and_goes_on_with_more_steps(corpus, two_steps):
    before = course(two_steps)
    assert run(config_of(corpus, 2), two_steps)[1] == 0
    assert course(two_steps) == before
    assert run(config_of(corpus, 4), two_steps)[1] == 2
    assert course(two_steps)[-1]["step"] == 4


def test_another_config_is_refused_with_the_keys_that_differ(whole, corpus):
    changed = config_of(corpus, optimizer__learning_rate=0.5, model__num_experts=8)
    with pytest.raises(ValueError, match=r"model\.num_experts: was 4, now 8") as error:
        run(changed, whole[0])
    assert "optimizer.learning_rate" in str(error.value)


def test_a_loss_that_is_not_finite_stops_the_run_and_nothing_is_lost(
    whole, corpus, tmp_path, monkeypatch
):
    def spoil(batch):
        batch = dict(batch)
        batch["loss_weights"] = np.full_like(batch["loss_weights"], np.inf)
        return batch

    with monkeypatch.context() as patch:
        stop_at(patch, 5, change=spoil)
        with pytest.raises(loop.NonFiniteLossError) as error:
            run(config_of(corpus), tmp_path)
    message = str(error.value)
    assert "at step 5" in message
    assert "the gradient of embed_tokens" in message
    assert "of step 3" in message
    model, _ = run(config_of(corpus), tmp_path)
    assert course(tmp_path) == course(whole[0])
    assert_same_model(model, whole[1])


def spoil_embedding(patch):
    """From step 4 on the embedding has an infinite row."""
    compiled_together = loop.compiled_together

    def spoiling(step):
        compiled = compiled_together(step)

        def call(state, batch):
            state, metrics = compiled(state, batch)
            if int(state.step) == 4:  # the row of a byte that UTF-8 never has
                table = state.params["embed_tokens"]
                state.params["embed_tokens"] = table.replace(table[...].at[255].set(np.inf))
            return state, metrics

        return call

    patch.setattr(loop, "compiled_together", spoiling)


def test_parameters_that_are_not_finite_are_not_saved_even_if_no_batch_reads_them(
    corpus, tmp_path, monkeypatch
):
    spoil_embedding(monkeypatch)
    with pytest.raises(loop.NonFiniteLossError) as error:
        run(config_of(corpus), tmp_path)
    message = str(error.value)
    assert "of step 6 made parameters that are not finite, first of all embed_tokens" in message
    assert "The last good checkpoint, of step 3" in message
    assert loop.last_step(tmp_path) == 3


def test_a_save_that_fails_ends_the_run_before_the_next_one(corpus, tmp_path, monkeypatch):
    def failed(self):
        if self._manager.all_steps():
            raise OSError("it failed meanwhile")

    monkeypatch.setattr(loop.CheckpointStore, "check", failed)
    with pytest.raises(OSError, match="it failed meanwhile"):
        run(config_of(corpus), tmp_path)
    assert loop.last_step(tmp_path) == 3


def test_parameters_that_are_not_finite_are_not_begun_with(corpus, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        spoil_embedding(patch)
        patch.setattr(loop, "first_non_finite", lambda params: None)  # from before they were found
        run(config_of(corpus, steps=6), tmp_path / "old")
    bad = "has parameters that are not finite, first of all embed_tokens"
    with pytest.raises(loop.NonFiniteLossError, match=f"checkpoints/6 {bad}; remove it"):
        run(config_of(corpus), tmp_path / "old")
    given = config_of(corpus, train__initial_checkpoint=str(tmp_path / "old"))
    with pytest.raises(loop.NonFiniteLossError, match=f"initial_checkpoint='.*' {bad}"):
        run(given, tmp_path / "new")


def test_accumulated_micro_batches_take_nearly_the_same_course(whole, corpus, tmp_path):
    config = config_of(corpus, steps=3, train__gradient_accumulation_steps=4)
    run(config, tmp_path)
    accumulated, at_once = (
        [line for line in course(folder) if "loss" in line and line["step"] <= 2]
        for folder in (tmp_path, whole[0])
    )
    # Only the balance term, at a weight of 1e-3, is another one.
    for a, b in zip(accumulated, at_once, strict=True):
        np.testing.assert_allclose(a["ce"], b["ce"], rtol=1e-2)
        assert a["tokens"] == b["tokens"]
    assert [line["step"] for line in accumulated] == [1, 2]


def test_a_second_run_in_a_directory_is_refused_while_the_first_one_lives(corpus, tmp_path):
    config = config_of(corpus, 2)

    def another(line):
        with pytest.raises(ValueError, match="Another process is training in"):
            run(config, tmp_path)
        return [{"text": "was refused"}]

    run(config, tmp_path, sample=another)
    assert "was refused" in (tmp_path / "samples.jsonl").read_text()
    assert run(config, tmp_path)[1] == 0  # it is free again


@pytest.mark.parametrize(("failing", "at"), [("evaluate", 2), ("suites", 2), ("sample", 1)])
def test_what_was_learnt_is_saved_though_an_evaluation_fails(failing, at, corpus, tmp_path):
    def config(steps):
        return config_of(corpus, steps, train__checkpoint_every=0, train__sample_every=1)

    def fail(*_):
        raise RuntimeError("the evaluation fails")

    with pytest.raises(RuntimeError, match="the evaluation fails"):
        run(config(2), tmp_path, **{failing: fail})
    assert (tmp_path / "checkpoints" / str(at)).exists()
    assert run(config(3), tmp_path)[1] == 3 - at


def test_a_run_does_not_go_on_with_other_records(corpus, tmp_path):
    texts = tmp_path / "texts"
    shutil.copytree(corpus, texts)
    run(config_of(texts, 2), tmp_path / "run")
    (texts / "new.txt").write_text("one more\n")
    with pytest.raises(ValueError, match=r"not what the run began with.*\n  text: 40 .*, 41 now"):
        run(config_of(texts, 3), tmp_path / "run")
    (texts / "0.txt").unlink()
    with pytest.raises(ValueError, match="40 records then, 40 now, in other files"):
        run(config_of(texts, 3), tmp_path / "run")
    # A finished run is left alone.
    assert run(config_of(texts, 2), tmp_path / "run")[1] == 0


def test_a_run_that_never_trained_may_begin_otherwise(corpus, tmp_path, monkeypatch):
    def no_memory(*_):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "compiled_together", no_memory)
        with pytest.raises(RuntimeError, match="out of memory"):
            run(config_of(corpus), tmp_path)
    run(config_of(corpus, steps=1, data__holdout_fraction=0.3), tmp_path)
    with pytest.raises(ValueError, match=r"data\.holdout_fraction: was 0\.3, now 0\.2"):
        run(config_of(corpus), tmp_path)


def test_a_directory_that_is_no_run_s_is_not_written_over(corpus, tmp_path):
    given = '{"model_type": "qwen3_next"}'
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text(given)
    with pytest.raises(ValueError, match=r"config.json is not a run's"):
        run(config_of(corpus), tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "config.json": given,
        "tokenizer.json": given,
    }


@pytest.mark.parametrize("given", ["5", '["train"]', '{"train": {}}', "no JSON"])
def test_a_config_that_is_no_run_s_is_not_written_over(corpus, tmp_path, given):
    (tmp_path / "config.json").write_text(given)
    with pytest.raises(ValueError, match=r"config.json is not a run's"):
        run(config_of(corpus), tmp_path)
    assert (tmp_path / "config.json").read_text() == given


def test_a_file_is_no_work_directory(corpus, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file is a file; name a directory"):
        run(config_of(corpus), tmp_path / "file")


def test_checkpoints_without_their_config_are_not_gone_on_with(corpus, two_steps):
    (two_steps / "config.json").unlink()
    with pytest.raises(ValueError, match=r"holds checkpoints but no config.json"):
        run(config_of(corpus, 3), two_steps)


def test_a_run_does_not_go_on_with_another_tokenizer(corpus, two_steps):
    texts = [path.read_text() for path in sorted(corpus.iterdir())]
    train_tokenizer(texts[:3], two_steps / "tokenizer.model", vocab_size=300)
    with pytest.raises(ValueError, match=r"the tokenizer's sha256: \w+ then, \w+ now"):
        run(config_of(corpus, 3), two_steps)


@pytest.mark.parametrize(
    ("loss", "error"), [(np.nan, loop.NonFiniteLossError), (1.0, loop.ExpertOverflowError)]
)
def test_what_is_not_finite_is_no_overflow_though_it_fills_the_buffers(
    loss, error, corpus, tmp_path, monkeypatch
):
    def halted(state, batch):
        values = {"halted": True, "loss": loss, "grad_norm": 1.0, "dropped_assignments": 9.0}
        return state, {name: jnp.asarray(value) for name, value in values.items()}

    monkeypatch.setattr(loop, "compiled_together", lambda step: halted)
    monkeypatch.setattr(loop, "first_bad_parameter", lambda *_: "norm/weight")
    with pytest.raises(error):
        run(config_of(corpus), tmp_path)


def test_fewer_steps_than_were_taken_are_refused(corpus, two_steps):
    with pytest.raises(ValueError, match="num_steps=1 lies before the checkpoint of step 2"):
        run(config_of(corpus, 1), two_steps)
    assert json.loads((two_steps / "config.json").read_text())["train"]["num_steps"] == 2


def test_a_run_stopped_while_it_is_traced_goes_on(corpus, tmp_path, monkeypatch):
    traced = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: traced.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: traced.append("stop"))
    config = config_of(corpus, 5, train__profile_steps=(2, 40))
    with pytest.raises(loop.Stopped):
        run(config, tmp_path, should_stop=iter((False, False, True)).__next__)
    assert traced == ["start", "stop"]
    run(config, tmp_path)  # the rest of what is to be traced, to the last step
    assert traced == ["start", "stop"] * 2
    run(config_of(corpus, 6, train__profile_steps=(2, 4)), tmp_path)
    assert traced == ["start", "stop"] * 2


@pytest.mark.parametrize("when", ["evaluate", "suites", "sample"])
def test_asked_to_stop_in_a_hook_a_run_saves_and_calls_no_other(corpus, tmp_path, when):
    called = []

    def hook(name, result):
        def call(*_):
            called.append(name)
            return result

        return call

    config = config_of(
        corpus,
        3,
        train__eval_every=1,
        train__sample_every=1,
        train__checkpoint_every=0,
        evaluation__every=1,
    )
    with pytest.raises(loop.Stopped, match="step 1 is saved"):
        run(
            config,
            tmp_path,
            evaluate=hook("evaluate", {"eval_ce": 1.0}),
            suites=hook("suites", {}),
            sample=hook("sample", []),
            should_stop=lambda: when in called,
        )
    order = ["evaluate", "suites", "sample"]
    assert called == order[: order.index(when) + 1]
    assert (tmp_path / "checkpoints/1").is_dir()


def test_asked_to_stop_in_the_last_step_s_evaluation_a_run_leaves_the_rest_for_later(
    corpus, tmp_path
):
    called = []

    def hook(name, result):
        return lambda *_: (called.append(name), result)[1]

    config = config_of(corpus, 2, train__sample_every=1, evaluation__every=1)
    hooks = dict(
        evaluate=hook("evaluate", {"eval_ce": 1.0}),
        suites=hook("suites", {"score": 1.0}),
        sample=hook("sample", [{"prompt": "", "text": "x"}]),
    )
    asked = ["suites", "sample", "evaluate"]  # those of the first step, then the last step's first
    with pytest.raises(loop.Stopped, match="step 2 is saved"):
        run(config, tmp_path, **hooks, should_stop=lambda: called[-3:] == asked)
    for rest in (["suites", "sample"], []):
        called.clear()
        assert run(config, tmp_path, **hooks)[1] == 0
        assert called == rest


@pytest.mark.parametrize(
    ("when", "saved_every", "steps"),  # of which the first is left: it may be the last one
    [("evaluate", 0, 2), ("evaluate", 1, 1), ("suites", 0, 1), ("suites", 1, 2)],
)
def test_a_stop_ends_an_evaluation_under_way_which_is_made_up_for(
    corpus, tmp_path, when, saved_every, steps
):
    called = []

    def hook(name, result):
        def call(model):
            called.append(name)
            if name == when:
                raise loop.Stopped
            return result

        return call

    config = config_of(
        corpus, steps, train__eval_every=1, train__checkpoint_every=saved_every, evaluation__every=1
    )
    hooks = dict(evaluate=hook("evaluate", {"eval_ce": 1.0}), suites=hook("suites", {"x": 1.0}))
    due = ["evaluate", "suites"]
    left = due[due.index(when) :]
    for calls in (due[: due.index(when) + 1], [when]):  # at the step, and when it is made up for
        with pytest.raises(loop.Stopped, match="step 1 is saved"):
            run(config, tmp_path, **hooks, should_stop=lambda: when in called)
        assert called == calls
        called.clear()
    when = None  # the hooks return now
    run(config, tmp_path, **hooks)
    assert called == left + due * (steps - 1)


def test_an_evaluation_that_a_stop_left_out_is_made_up_for(corpus, tmp_path):
    config = config_of(corpus, 2, train__checkpoint_every=0)
    with pytest.raises(loop.Stopped, match="step 2 is saved"):
        run(config, tmp_path, should_stop=iter((False, True)).__next__)
    for _ in range(2):
        assert run(config, tmp_path)[1] == 0
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines if "eval_ce" in line] == [2]


def test_what_a_kill_left_undone_behind_a_checkpoint_is_made_up_for(corpus, tmp_path):
    called, first = [], ["suites", "sample", "report"]

    def suites(model):
        called.append("suites")
        if called == [*first, "suites"]:
            raise KeyboardInterrupt  # like a kill: no handler saves
        return {"score": 1.0}

    def sample(model):
        called.append("sample")
        return [{"prompt": "", "text": "x"}]

    hooks = dict(suites=suites, sample=sample, report=lambda: called.append("report"))
    config = config_of(
        corpus, 2, train__checkpoint_every=1, train__sample_every=1, evaluation__every=1
    )
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path, **hooks)
    assert called == [*first, "suites"]
    assert (tmp_path / "checkpoints/2").is_dir()
    for again in (first, []):
        before = len(called)
        assert run(config, tmp_path, **hooks)[1] == 0
        assert called[before:] == again
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "score" in line] == [1, 2]


def test_mtp_and_router_weights_move_in_training(whole, corpus):
    config = config_of(corpus)
    program = loop.make_program(config, mesh := make_mesh(config.mesh))
    with jax.set_mesh(mesh):
        start = dict(named_leaves(loop._random_state(config, program).params))
    end = dict(named_leaves(nnx.state(whole[1])))
    for name in ("mtp/fc", "mtp/layer/mlp/router", "groups/layers/0/mlp/router"):
        assert np.abs(np.asarray(end[name]) - np.asarray(start[name])).max() > 1e-4, name


def in_a_process(corpus, workdir, *changes, devices=1):
    return subprocess.Popen(
        [sys.executable, HERE / "small_run.py", corpus, workdir, *changes],
        env=os.environ | {"XLA_FLAGS": virtual_devices(devices), "JAX_PLATFORMS": "cpu"},
        stderr=subprocess.PIPE,
    )


def last_step(workdir):
    """The last whole line of a run that is under way."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    steps = [int(line.split('"step": ')[1].split(",")[0]) for line in lines if line.endswith("}")]
    return max(steps, default=0)


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_same_losses(corpus, tmp_path):
    steps = "train.num_steps=90"  # some are left after the last kill
    whole = in_a_process(corpus, tmp_path / "whole", steps)
    assert whole.wait() == 0, whole.stderr.read().decode()
    rng = random.Random(time.time_ns())
    for tens in range(1, 6):
        process = in_a_process(corpus, tmp_path / "killed", steps)
        until = 10 * tens - rng.randrange(10)
        while last_step(tmp_path / "killed") < until and process.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.2))  # in the middle of a step, of saving, of deleting
        assert process.poll() is None, process.stderr.read().decode()
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = in_a_process(corpus, tmp_path / "killed", steps)
    assert last.wait() == 0, last.stderr.read().decode()
    assert course(tmp_path / "killed") == course(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=8", "fsdp=4"])
def test_eight_devices_take_the_course_of_one(corpus, tmp_path, mesh):
    axis, size = mesh.split("=")
    changes = [
        f"mesh.{axis}={size}",
        f"mesh.{'fsdp' if axis == 'data' else 'data'}={8 // int(size)}",
    ]
    single = in_a_process(corpus, tmp_path / "one")
    assert single.wait() == 0, single.stderr.read().decode()
    many = in_a_process(corpus, tmp_path / "many", *changes, devices=8)
    assert many.wait() == 0, many.stderr.read().decode()
    for a, b in zip(course(tmp_path / "many"), course(tmp_path / "one"), strict=True):
        assert a.keys() == b.keys()
        for key in of_the_model(a):
            # float32 sums in another order, amplified over eight steps of AdamW
            np.testing.assert_allclose(a[key], b[key], rtol=1e-3, err_msg=key)


def train_together(processes, devices, corpus, workdir):
    return start(
        "train.py",
        f"--config={HERE / 'smallest.py'}",
        f"--workdir={workdir}",
        "--peer_timeout=15",
        processes=processes,
        devices=devices,
        env={"CORPUS": str(corpus)},
    )


def wait_for_step(launched, workdir, step):
    while last_step(workdir) < step:
        assert launched.poll() is None, launched.communicate()[1]
        time.sleep(0.02)


@pytest.mark.slow
def test_processes_take_the_course_of_one_through_a_kill_a_stop_and_another_count(corpus, tmp_path):
    one, many = tmp_path / "one", tmp_path / "many"
    single = train_together(1, 4, corpus, one)
    assert single.wait() == 0, single.stderr.read()

    # Two processes, of which one is killed: the other ends by itself and names it.
    killed = train_together(2, 2, corpus, many)
    first_line = killed.stderr.readline()
    wait_for_step(killed, many, 10)
    os.kill(int(first_line.split(" 1: ")[1]), signal.SIGKILL)
    err = killed.communicate()[1]
    assert killed.returncode == 128 + signal.SIGKILL
    assert any("process 1 (" in line and "is missing" in line for line in lines(err, 0)), err
    assert "Killing" not in err
    before = {line["step"]: line for line in course(many)}

    # Again: it goes on as before, bit for bit, and SIGTERM loses no step.
    stopped = train_together(2, 2, corpus, many)
    wait_for_step(stopped, many, max(before) + 5)
    stopped.send_signal(signal.SIGTERM)
    err = stopped.communicate()[1]
    assert stopped.returncode == 0, err
    after = {line["step"]: line for line in course(many)}
    for step, line in before.items():
        assert after[step] == line, step
    saved = max(int(path.name) for path in (many / "checkpoints").iterdir())
    assert max(after) == saved
    assert saved < 60

    # The rest in four processes.
    last = train_together(4, 1, corpus, many)
    err = last.communicate()[1]
    assert last.returncode == 0, err
    assert f"Going on from the checkpoint of step {saved}" in err
    for a, b in zip(course(many), course(one), strict=True):
        assert a.keys() == b.keys()
        for key in of_the_model(a):
            # Sums over processes in another order: float32, amplified over 60 steps of AdamW.
            np.testing.assert_allclose(a[key], b[key], rtol=1e-3, err_msg=f"{key} at {a['step']}")


@pytest.mark.slow
def test_experts_that_overflow_end_the_run_or_are_counted(corpus, tmp_path):
    # Room for an even load only, which no router keeps to.
    tight = ["mesh.data=2", "mesh.expert=4", "mesh.moe_buffer_factor=1.0", "train.num_steps=2"]
    ended = in_a_process(corpus, tmp_path / "ended", *tight, devices=8)
    assert ended.wait() != 0
    message = ended.stderr.read().decode()
    assert "ExpertOverflowError: At step 1, " in message
    assert "Raise the factor" in message
    counted = in_a_process(
        corpus, tmp_path / "counted", *tight, 'mesh.on_overflow="drop"', devices=8
    )
    assert counted.wait() == 0, counted.stderr.read().decode()
    steps = [line for line in course(tmp_path / "counted") if "dropped_assignments" in line]
    assert len(steps) == 2
    assert all(line["dropped_assignments"] > 0 for line in steps)
