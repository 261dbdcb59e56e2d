"""Through our adapter lm-evaluation-harness finds what it finds through its own backend."""

import functools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hf_directory import transformers_model
from hf_tokenizer import CHATML, make_tokenizer_json
from local_tasks import write_tasks

import qwen3next_jax as q3n
from qwen3next_jax.config import EvaluationConfig
from qwen3next_jax.data.tokenizer import load_tokenizer
from qwen3next_jax.evaluation.evaluator import Evaluator, RowScores
from qwen3next_jax.evaluation.suites import check_suites, check_usable

pytestmark = pytest.mark.slow  # importing the harness takes longer than most tests

TASKS = ["local_choice", "local_text", "local_generation"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A directory as transformers writes it, a tokenizer with a chat template beside it."""
    folder = tmp_path_factory.mktemp("harness") / "hf"
    transformers_model("chat").save_pretrained(folder)
    make_tokenizer_json(folder, tokenizer_class="PreTrainedTokenizerFast")
    # As Qwen's: a BOS that the tokenizer itself does not name.
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 0, "eos_token_id": [2, 0]})
    )
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, checkpoint):
    """The tasks; for half of the generations the right answer is what transformers writes."""
    import os

    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))
    folder = tmp_path_factory.mktemp("tasks")
    prompts = write_tasks(folder)
    tokenizer, answers = load_tokenizer(checkpoint), {}
    for prompt in prompts[::2]:
        ids = torch.tensor([tokenizer.encode(prompt)])
        new = transformers_model("chat").generate(
            ids, max_new_tokens=20, do_sample=False, eos_token_id=tokenizer.eos_id
        )
        text = tokenizer.decode(new[0, ids.shape[1] :].tolist())
        for stop in ("a", "\n\n", "re"):
            text = text.split(stop)[0]
        answers[prompt] = text
    write_tasks(folder, answers=answers)
    return folder


@functools.cache
def evaluator(checkpoint, batch_size=0):
    return Evaluator(q3n.load_hf(checkpoint), load_tokenizer(checkpoint), batch_size=batch_size)


def run_ours(checkpoint, tasks, names, **options):
    from qwen3next_jax.evaluation.harness import run_tasks

    batch_size = options.pop("batch_size", 0)
    return run_tasks(evaluator(checkpoint, batch_size), names, include_path=str(tasks), **options)


@functools.cache
def run_theirs(checkpoint, tasks, names, chat, batch_size=1):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=str(checkpoint), dtype="float32", device="cpu", batch_size=batch_size)
    return lm_eval.simple_evaluate(
        model=lm,
        tasks=list(names),
        task_manager=TaskManager(include_path=str(tasks)),
        apply_chat_template=chat,
        random_seed=1234,
        fewshot_random_seed=1234,
    )


@pytest.mark.parametrize("batch_size", [1, 4, 0])
@pytest.mark.parametrize("chat", [False, True])
def test_each_request_and_each_accuracy_equal_the_transformers_backends(
    checkpoint, tasks, chat, batch_size
):
    names = ("local_chat",) if chat else tuple(TASKS)
    theirs = run_theirs(checkpoint, tasks, names, chat)
    ours = run_ours(checkpoint, tasks, names, chat=chat, batch_size=batch_size)
    compared = 0
    for name in names:
        for want, got in zip(theirs["samples"][name], ours["samples"][name], strict=True):
            assert got["prompt_hash"] == want["prompt_hash"]
            for a, b in zip(got["resps"], want["resps"], strict=True):
                compared += 1
                if name == "local_generation":
                    assert a == b
                    continue
                a, b = (x[0] if name == "local_text" else x[0][0] for x in (a, b))
                # The project's promise; what is seen is float32 rounding, below 1e-4.
                np.testing.assert_allclose(float(a), float(b), atol=1e-3)
        for metric, value in ours["tasks"][name].items():
            if "stderr" not in metric:
                want = theirs["results"][name][f"{metric},none"]
                np.testing.assert_allclose(value, want, rtol=1e-5, err_msg=metric)
    assert compared == (18 if chat else 18 + 3 + 5)
    if not chat:
        assert ours["tasks"]["local_generation"]["exact_match"] >= 3 / 5


def ask(*arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type="", doc={}, arguments=arguments, idx=0)]


@functools.cache
def both(checkpoint):
    """Our backend and the harness's own."""
    from lm_eval.models.huggingface import HFLM

    from qwen3next_jax.evaluation.harness import HarnessLM

    theirs = HFLM(pretrained=str(checkpoint), dtype="float32", device="cpu", batch_size=1)
    return HarnessLM(evaluator(checkpoint)), theirs


def test_a_special_token_stops_a_text(checkpoint, tmp_path):
    def written(lm, *until):
        options = {"until": list(until), "max_gen_toks": 12}
        return lm.generate_until(ask("def f(x): return", options))[0]

    # The model writes the special token where it wrote its fourth one.
    (tokens,) = evaluator(checkpoint).generate(
        [load_tokenizer(checkpoint).encode("def f(x): return")], max_new_tokens=12
    )
    assert tokens[3] not in tokens[:3]
    folder = tmp_path / "hf"
    shutil.copytree(checkpoint, folder)
    model = transformers_model("chat")
    with torch.no_grad():
        for table in (model.model.embed_tokens.weight, model.lm_head.weight):
            table[[1, tokens[3]]] = table[[tokens[3], 1]]
    model.save_pretrained(folder)
    ours, theirs = both(folder)
    stopped, unstopped = written(ours, "<|im_start|>"), written(ours)
    assert stopped == written(theirs, "<|im_start|>")
    assert unstopped == written(theirs)
    assert len(stopped) < len(unstopped)


def test_a_text_without_context_stands_behind_what_theirs_does(checkpoint):
    ours, theirs = both(checkpoint)
    assert ours.prefix_token_id == theirs.prefix_token_id == 2
    got, want = (lm.loglikelihood(ask("", "return x"))[0] for lm in (ours, theirs))
    np.testing.assert_allclose(got[0], want[0], atol=1e-3)
    alone, behind = (ours._loglikelihood_tokens([("", c, [5, 6])])[0] for c in ([], [2]))
    assert alone == behind


STRIPPED = CHATML.replace("message.content", "message.content | trim")


@pytest.mark.parametrize("template", [CHATML, STRIPPED], ids=["kept", "stripped"])
@pytest.mark.parametrize("begun", ["The answer is", "Here it is:\n```python\n", "\n", "<|im_end|>"])
def test_an_answer_is_begun_as_theirs_is(checkpoint, template, begun, monkeypatch):
    ours, theirs = both(checkpoint)
    for lm in (ours, theirs):
        monkeypatch.setattr(lm.tokenizer, "chat_template", template)
    chat = [{"role": "user", "content": "Sort."}, {"role": "assistant", "content": begun}]
    got, want = (lm.apply_chat_template(chat, add_generation_prompt=False) for lm in (ours, theirs))
    assert got == want


def test_system_messages_that_a_template_refuses_are_left_out_as_theirs_are(
    checkpoint, monkeypatch
):
    refuses = "{{ raise_exception('No system role') }}"
    template = "{% if messages[0].role == 'system' %}" + refuses + "{% endif %}" + CHATML
    ours, theirs = both(checkpoint)
    for lm in (ours, theirs):
        monkeypatch.setattr(lm.tokenizer, "chat_template", template)
    chat = [{"role": role, "content": f"{role}?"} for role in ("system", "user", "assistant")]
    for messages, more in ((chat[:2], True), (chat, False)):
        got, want = (lm.apply_chat_template(messages, more) for lm in (ours, theirs))
        assert got == want
        assert "user?" in got
    monkeypatch.setattr(ours.tokenizer, "chat_template", refuses)
    with pytest.raises(ValueError, match="No system role"):
        ours.apply_chat_template(chat[1:2])


def test_a_continuation_without_tokens_is_refused(checkpoint):
    ours, _ = both(checkpoint)
    with pytest.raises(ValueError, match=r"continuation of \('def', ''\) adds no token"):
        ours.loglikelihood(ask("def", ""))


def test_options_that_ask_for_nothing_are_taken_and_others_refused_before_anything_runs(
    checkpoint, tasks, tmp_path
):
    import yaml

    ours, _ = both(checkpoint)
    options = {"until": ["a"], "max_gen_toks": 30}
    nothing = {**options, "num_beams": 1, "top_k": 0, "do_sample": False, "temperature": 5.0}
    assert ours.generate_until(ask("x", nothing)) == ours.generate_until(ask("x", options))
    task = yaml.safe_load((tasks / "local_generation.yaml").read_text())
    more = {"beams": {"num_beams": 4}, "essay": {"max_gen_toks": 512}}
    for name, option in (more | {"mixed": {"until": ["<|im_end|>\n"]}}).items():
        task |= {"task": name, "generation_kwargs": {"until": ["a"]} | option}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(task))
    with pytest.raises(ValueError, match=r"task beams cannot be run here: .*\['num_beams'\]"):
        run_ours(checkpoint, tmp_path, ["beams"])
    with pytest.raises(ValueError, match="task mixed cannot be run here: The stop string"):
        run_ours(checkpoint, tmp_path, ["mixed"])
    message = "task essay cannot be run here: max_gen_toks=512 leaves"
    with pytest.raises(ValueError, match=message):
        run_ours(checkpoint, tmp_path, ["essay"])

    # A run that evaluates hears of it before its first step.
    evaluated = evaluator(checkpoint)
    given = evaluated.model.config, evaluated.tokenizer, {}
    asked = EvaluationConfig(tasks=("essay",), include_path=str(tmp_path))
    with pytest.raises(ValueError, match=message):
        check_usable(["lm_eval"], asked, *given)
    missing = EvaluationConfig(tasks=(f"{tmp_path}/essai.yaml",))
    with pytest.raises(FileNotFoundError, match=r"essai\.yaml does not exist"):
        check_suites(["lm_eval"], missing)


def test_code_is_not_run_unless_allowed_in_so_many_words(checkpoint, tasks):
    with pytest.raises(ValueError, match=r"local_code would run code .* --confirm_run_unsafe_code"):
        run_ours(checkpoint, tasks, ["local_code", "local_choice"])
    allowed = run_ours(checkpoint, tasks, ["local_code"], confirm_run_unsafe_code=True)
    assert allowed["tasks"]["local_code"]["exact_match"] == 0


def test_unknown_tasks_come_with_the_nearest_known_ones(checkpoint, tasks):
    with pytest.raises(ValueError, match=r"'local_choise' \(did you mean 'local_choice'"):
        run_ours(checkpoint, tasks, ["local_choise"])


def test_a_context_that_is_too_long_loses_its_beginning_and_is_counted(checkpoint):
    from qwen3next_jax.evaluation.harness import HarnessLM

    lm = HarnessLM(evaluator(checkpoint))
    end = "x" * 511  # tokens of one character each
    n = len(lm.tok_encode(end))
    assert n == 511
    long, short = (lm.loglikelihood(ask(text, "!q"))[0] for text in ("???" + end, end[:511]))
    assert lm.truncated == 1
    # The context has room for 512 tokens, the last one predicted aside: of "???" none is left.
    assert long == short
    options = {"until": ["\n"], "max_gen_toks": 12}
    lm.generate_until(ask("y" * 501, options))
    assert lm.truncated == 2
    lm.generate_until(ask("y" * 500, options))  # which fits
    assert lm.truncated == 2
    for count in (512, 600):
        with pytest.raises(ValueError, match=f"max_gen_toks={count} leaves no room"):
            lm.generate_until(ask("y", {**options, "max_gen_toks": count}))


class Reader(Evaluator):
    """Only notes what it is to read."""

    def __init__(self, context):
        self.model = SimpleNamespace(config=SimpleNamespace(context_length=context))
        self.tokenizer, self.read = load_tokenizer("bytes"), []
        self.tokenizer.adds_bos = False  # as Qwen's

    def score(self, rows):
        self.read += rows
        zeros = [np.zeros(len(row) - 1, np.float32) for row in rows]
        return [RowScores(losses, losses) for losses in zeros]

    def generate(self, prompts, **_):
        self.read += prompts
        return [[] for _ in prompts]


def test_of_what_is_too_long_the_end_is_read_as_far_as_the_context_goes():
    from qwen3next_jax.evaluation.harness import HarnessLM

    evaluator = Reader(context=8)
    lm = HarnessLM(evaluator)
    lm.loglikelihood(ask("abcdefghijkl", "xy"))
    lm.generate_until(ask("abcdefghijkl", {"until": ["."], "max_gen_toks": 3}))
    # Of a row all but the last are read; of a prompt and what is written, all.
    assert [bytes(row) for row in evaluator.read] == [b"fghijklxy", b"hijkl"]
    assert lm.truncated == 2


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_long_text_is_cut_into_windows_that_predict_each_token_once(adds_bos):
    from qwen3next_jax.evaluation.harness import HarnessLM

    evaluator = Reader(context=8)
    evaluator.tokenizer.adds_bos = adds_bos
    evaluator.tokenizer.special_tokens = {}  # a tokenizer may add a BOS that it does not name
    lm = HarnessLM(evaluator)
    lm.loglikelihood_rolling(ask("abcdefghijklmnopqr"))
    first, *others = evaluator.read
    assert first == [lm.prefix_token_id, *b"abcdefgh"]
    assert (lm.prefix_token_id == evaluator.tokenizer.bos_id) == adds_bos
    assert [bytes(row) for row in others] == [b"hijklmnop", b"jklmnopqr"]
    assert lm.truncated == 0


def test_examples_seed_and_limit_are_those_asked_for(tasks):
    from qwen3next_jax.evaluation.harness import run_tasks

    def prompts(seed):
        found = run_tasks(
            Reader(context=4096),
            ["local_chat"],
            include_path=str(tasks),
            num_fewshot=2,
            seed=seed,
            limit=4,
        )
        samples = found["samples"]["local_chat"]
        assert found["num_fewshot"] == {"local_chat": 2}  # the task says 1
        return [sample["arguments"][0][0] for sample in samples]

    first = prompts(seed=1)
    assert [len(prompt.split("\n\n")) for prompt in first] == [3] * 4  # the question besides
    assert prompts(seed=1) == first
    assert prompts(seed=2) != first
