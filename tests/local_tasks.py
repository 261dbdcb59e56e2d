"""Tasks of lm-evaluation-harness on data made on the spot: YAML files, JSON lines beside them."""

import json

import numpy as np
import yaml

WORDS = "def return lambda import class yield while print range self".split()  # noqa: SIM905


def write_tasks(folder, *, answers=None):
    """Writes the tasks; `answers` of `local_generation`, or random ones."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)

    def text(words):
        return " ".join(rng.choice(WORDS, words))

    def task(name, docs, **config):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        given = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "metadata": {"version": 1},
            **config,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(given))

    choices = [
        {
            "question": text(rng.integers(1, 8)),
            "choices": [text(n) for n in (1, 2, 4)],
            "answer": int(rng.integers(3)),
        }
        for _ in range(6)
    ]
    metrics = [{"metric": "acc"}, {"metric": "acc_norm"}]
    shared = dict(
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_target="{{answer}}",
        doc_to_choice="{{choices}}",
        metric_list=metrics,
    )
    task("local_choice", choices, **shared)
    task(
        "local_chat",
        choices,
        **shared,
        fewshot_split="test",
        num_fewshot=1,
        description="Answer with one of these.",
    )
    task(
        "local_text",
        [{"text": text(n) + "\n"} for n in (3, 40, 260)],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    )
    prompts = [text(n) for n in (1, 2, 3, 5, 6)]  # few lengths, hence few programs
    task(
        "local_generation",
        [{"prompt": p, "answer": (answers or {}).get(p, "")} for p in prompts],
        output_type="generate_until",
        doc_to_text="{{prompt}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["a", "\n\n", "re"], "max_gen_toks": 20},
        metric_list=[{"metric": "exact_match"}],
    )
    task(
        "local_code",
        [{"prompt": "x", "answer": "y"}],
        output_type="generate_until",
        doc_to_text="{{prompt}}",
        doc_to_target="{{answer}}",
        unsafe_code=True,
        generation_kwargs={"until": ["\n"], "max_gen_toks": 4},
        metric_list=[{"metric": "exact_match"}],
    )
    return prompts
