"""The shipped examples run as written, and the ablated layer of the study is the library's own."""

import pathlib
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from oracles import quick_jit

import qwen3next_jax as q3n

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for name in ("modules_in_nnx", "modules_in_linen", "associative_recall"):
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
