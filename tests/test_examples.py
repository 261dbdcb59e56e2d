"""The shipped examples run as written, and the ablated layer of the study is the library's own."""

import json
import pathlib
import sys

import hf_directory
import jax
import numpy as np
import pytest
import torch
from flax import nnx
from hf_tensors import dump_tensors
from hf_tokenizer import make_tokenizer_json
from oracles import DENSE, quick_jit, random_model, small_config
from test_sft import TEMPLATE, chat

import qwen3next_jax as q3n
from qwen3next_jax.parallel.names import named_leaves

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for name in ("modules_in_nnx", "modules_in_linen", "associative_recall", "lora"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "name", ["modules_in_nnx", pytest.param("modules_in_linen", marks=pytest.mark.slow)]
)
def test_modules_learn_inside_somebody_elses_model(name):
    losses = __import__(name).main(steps=20)
    # From chance (ln 16 = 2.8 nats): the table is half learnt after 20 steps.
    assert losses[-1] < 0.6 * losses[0]


def test_unablated_layer_of_the_study_equals_the_librarys():
    import associative_recall as study

    x = np.random.default_rng(0).standard_normal((2, 32, study.CONFIG.hidden_size), np.float32)
    ours, theirs = (
        quick_jit(lambda x, layer=layer: layer(study.CONFIG, rngs=nnx.Rngs(0))(x))(x)
        for layer in (q3n.GatedDeltaNet, study.AblatedDeltaNet)
    )
    # The same float32 operations in another order.
    np.testing.assert_allclose(theirs, ours, atol=1e-5 * np.abs(ours).max())


def test_gated_linear_attention_equals_its_recurrence():
    import associative_recall as study

    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 1, 12, 2, 4)).astype(np.float32)
    g, beta = -rng.exponential(size=(1, 12, 2)).astype(np.float32), rng.uniform(size=(1, 12, 2))
    out, _ = study.gated_linear_attention(q, k, v, log_decay=g, beta=beta.astype(np.float32))
    state = np.zeros((2, 4, 4))
    for t in range(12):
        state *= np.exp(g[0, t, :, None, None])
        state += np.einsum("n,nh,np->nhp", beta[0, t], k[0, t], v[0, t])
        expected = np.einsum("nh,nhp->np", q[0, t], state)
        # Float32 against float64; decays are differences of sums of up to 30, hence 1e-5.
        np.testing.assert_allclose(out[0, t], expected, rtol=1e-4, atol=1e-5)


def test_answers_of_the_tasks_equal_a_dictionary():
    import associative_recall as study

    for task in study.LEVELS:
        tokens, targets, _ = map(np.asarray, study.make_batch(task, jax.random.key(1), 16))
        for row, answers in zip(tokens, targets, strict=True):
            memory = {}
            for key, value in row[: 2 * study.WRITES].reshape(-1, 2):
                if key == study.RESET:
                    memory = {}
                elif key != study.BLANK:
                    memory[key] = value
            asked = row[2 * study.WRITES :]
            assert [memory.get(key, study.NONE) for key in asked] == list(answers)


@pytest.mark.slow
def test_study_runs_and_reports(tmp_path):
    import associative_recall as study

    records = study.main(["--quick", f"--output={tmp_path}"])
    assert {(r["variant"], r["task"]) for r in records} == {
        (variant, task) for variant in study.VARIANTS for task in study.LEVELS
    }
    for ending in ("json", "md", "png"):
        assert (tmp_path / f"associative_recall.{ending}").stat().st_size > 0


@pytest.mark.parametrize(
    "config", [small_config(num_hidden_layers=4, mtp_steps=1), q3n.ModelConfig.from_hf(DENSE)]
)
def test_low_rank_updates_are_nothing_at_first_and_then_of_that_rank_in_each_layer(config):
    import lora

    params = nnx.state(random_model(config), nnx.Param)
    updates = lora.new_updates(params, rank=2)
    before = dump_tensors(params, config)
    for name, tensor in dump_tensors(lora.summed(params, updates, scale=2.0), config).items():
        np.testing.assert_array_equal(tensor, before[name])
    rng = np.random.default_rng(0)
    updates = {path: (a, rng.standard_normal(b.shape)) for path, (a, b) in updates.items()}
    sums = lora.summed(params, updates, scale=2.0)
    path = next(path for path in updates if path.endswith("self_attn/o_proj"))
    a, b = (np.asarray(x[0], np.float64) for x in updates[path])  # of the first group of layers
    was, became = (np.asarray(dict(named_leaves(tree))[path][0]) for tree in (params, sums))
    # Rounded to float32; the numbers are of size 1.
    np.testing.assert_allclose(became, was + 2 * (a @ b).reshape(was.shape), atol=1e-5)
    ranks = {}
    for name, tensor in dump_tensors(sums, config).items():
        change = np.asarray(tensor, np.float64) - np.asarray(before[name], np.float64)
        # The sums are rounded to float32, so that what is beyond the rank is not quite zero.
        ranks[name] = np.linalg.matrix_rank(change, tol=1e-4) if tensor.ndim == 2 else change.any()
    for name, rank in ranks.items():
        parts = {"in_proj_qkvz": 4, "q_proj": 1 + config.attention_output_gate}  # in one tensor
        part = name.split(".")[-2]
        assert rank == (2 * parts.get(part, 1) if has_update(name) else 0), name


def has_update(name):
    """Whether the example changes a tensor of this name."""
    return name.endswith(("_proj.weight", "_proj_qkvz.weight")) and ".experts." not in name


@pytest.mark.slow
def test_low_rank_fine_tuning_learns_answers_and_writes_a_model_of_the_sums(tmp_path, capsys):
    import lora

    given, new = tmp_path / "given", tmp_path / "new"
    tensors = hf_directory.released(given, name="chat", dtype=torch.float32)
    make_tokenizer_json(given)
    (given / "chat_template.jinja").write_text(TEMPLATE.read_text())
    (given / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    chats = [json.dumps({"messages": chat(i)}) for i in range(200)]
    (tmp_path / "chats.jsonl").write_text("\n".join(chats))
    arguments = [
        f"--model={given}", f"--chats={tmp_path}/chats.jsonl", f"--output={new}", "--rank=4",
        "--steps=40", "--batch=8", "--length=160", "--learning_rate=1e-2",
        "--holdout_fraction=0.1",
    ]  # fmt: skip
    before, after = lora.main(arguments)
    assert after < before / 2
    written = hf_directory.read(new)
    same = {name for name, tensor in tensors.items() if written[name] == hf_directory.bits(tensor)}
    assert written.keys() == tensors.keys()
    assert {name for name in tensors if not has_update(name)} == same
    assert {"tokenizer.json", "chat_template.jinja"} <= {path.name for path in new.iterdir()}
    with pytest.raises(SystemExit):
        lora.main(arguments)
    assert "exists; name a new directory" in capsys.readouterr().err
