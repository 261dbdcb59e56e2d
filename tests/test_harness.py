"""Through our adapter lm-evaluation-harness finds what it finds through its own backend."""

import functools

import numpy as np
import pytest
import torch
from hf_directory import transformers_model
from hf_tokenizer import CHATML, make_tokenizer_json
from local_tasks import write_tasks

import qwen3next_jax as q3n
from qwen3next_jax.data.tokenizer import load_tokenizer
from qwen3next_jax.evaluation.evaluator import Evaluator

pytestmark = pytest.mark.slow  # importing the harness takes longer than most tests

TASKS = ["local_choice", "local_text", "local_generation"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A directory as transformers writes it, a tokenizer with a chat template beside it."""
    folder = tmp_path_factory.mktemp("harness") / "hf"
    transformers_model("chat").save_pretrained(folder)
    make_tokenizer_json(folder, tokenizer_class="PreTrainedTokenizerFast")
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
    return run_tasks(
        evaluator(checkpoint, batch_size), names, include_path=str(tasks), **options
    )  # fmt: skip


@functools.cache
def run_theirs(checkpoint, tasks, names, chat, batch_size=1):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=str(checkpoint), dtype="float32", device="cpu", batch_size=batch_size)
    return lm_eval.simple_evaluate(
        model=lm, tasks=list(names), task_manager=TaskManager(include_path=str(tasks)),
        apply_chat_template=chat, random_seed=1234, fewshot_random_seed=1234,
    )  # fmt: skip


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


def test_code_is_not_run_unless_allowed_in_so_many_words(checkpoint, tasks):
    with pytest.raises(ValueError, match=r"local_code would run code .* --confirm_run_unsafe_code"):
        run_ours(checkpoint, tasks, ["local_code", "local_choice"])
    allowed = run_ours(checkpoint, tasks, ["local_code"], confirm_run_unsafe_code=True)
    assert allowed["tasks"]["local_code"]["exact_match"] == 0


def test_unknown_tasks_come_with_the_nearest_known_ones(checkpoint, tasks):
    with pytest.raises(ValueError, match=r"'local_choise' \(did you mean 'local_choice'"):
        run_ours(checkpoint, tasks, ["local_choise"])


def test_a_context_that_is_too_long_loses_its_beginning_and_is_counted(checkpoint):
    from lm_eval.api.instance import Instance

    from qwen3next_jax.evaluation.harness import HarnessLM

    def ask(kind, *arguments):
        return [Instance(request_type=kind, doc={}, arguments=arguments, idx=0)]

    lm = HarnessLM(evaluator(checkpoint))
    end = "x" * 511  # tokens of one character each
    n = len(lm.tok_encode(end))
    assert n == 511
    long, short = (lm.loglikelihood(ask("", text, "!q"))[0] for text in ("???" + end, end[:511]))
    assert lm.truncated == 1
    # The context has room for 512 tokens, the last one predicted aside: of "???" none is left.
    assert long == short
    options = {"until": ["\n"], "max_gen_toks": 12}
    lm.generate_until(ask("", "y" * 501, options))
    assert lm.truncated == 2
    with pytest.raises(ValueError, match="max_gen_toks=600 leaves no room"):
        lm.generate_until(ask("", "y", {**options, "max_gen_toks": 600}))
