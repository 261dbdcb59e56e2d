"""The plan's command, and its arithmetic against the TPU compiler."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import tpu_program
from launched import TESTS, run_python

from qwen3next_jax.plan import tpu
from qwen3next_jax.plan.chips import CHIPS

ROOT = pathlib.Path(__file__).parents[1]


def plan(*options, timeout=300):
    return subprocess.run(
        [sys.executable, "-m", "qwen3next_jax.plan", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def planned(*options, timeout=300):
    done = plan(*options, "--json", timeout=timeout)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_command_prints_one_object_as_its_last_line():
    last = planned("--config=configs/80b_a3b.py", "--config.train.num_steps=10")
    assert last["parameters"] == sum(last["parameters_by_part"].values()) == 81_324_862_720
    assert last["flops_per_token"] == pytest.approx(8.04e9 + 106496 * 4096, rel=1e-3)
    assert last["memory_bytes"] == pytest.approx(sum(last["memory_by_part"].values()))
    assert last["fits"] is (last["memory_bytes"] <= CHIPS["v5p"].hbm)
    assert last["step_seconds"] > 0
    assert last["frozen_parameters"] == 0
    globs = ("*/mlp/gate_up_proj", "*/mlp/down_proj")
    frozen = planned("--config=configs/80b_a3b.py", f"--config.train.frozen_parameters={globs}")
    assert frozen["frozen_parameters"] == 49 * 512 * 3 * 2048 * 512  # the experts of all layers
    assert frozen["parameters"] == last["parameters"]
    assert frozen["memory_bytes"] < last["memory_bytes"]
    assert frozen["step_seconds"] < last["step_seconds"]


def test_command_says_what_is_wrong_with_a_topology():
    done = plan("--config=configs/tiny.py", "--topology=v5q:4x4x4")
    assert done.returncode != 0
    assert "give one such as v5p:4x4x4" in done.stderr
    assert "Traceback" not in done.stderr


def test_command_says_which_key_no_config_has():
    done = plan("--config=configs/tiny.py", "--config.train.num_stepz=3")
    assert done.returncode == 1
    assert "error: The config has no key 'num_stepz' Did you mean \"num_steps\"" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_plan_for_gpus_is_by_arithmetic_alone():
    shape = ["--config=configs/80b_a3b.py", "--topology=h200:16"]
    done = plan(*shape, "--search", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["topology"] == "h200:16"
    assert result["source"] == "arithmetic"
    assert not any("compiled" in row for row in result["search"])
    done = plan(*shape, "--compile")
    assert done.returncode == 1
    assert "error: --compile asks the TPU compiler, which knows no h200:16" in done.stderr


def test_search_compiles_as_many_as_told_and_names_the_fastest_of_them():
    options = ["--config=configs/tiny.py", "--topology=v5p:2x2x1", "--search", "--best=3", "--json"]
    done = run_python(
        TESTS / "tpu_answers.py", "0", *options, cwd=ROOT, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["search"]
    assert len({(row["remat"], *row["mesh"].values()) for row in rows}) == len(rows) == 10
    assert [row.get("compiled") for row in rows[:3]] == [
        "used 120G of 96G",
        dict(memory_bytes=1e9, step_seconds=9.0),
        dict(memory_bytes=1e9, step_seconds=8.0),
    ]
    assert not any("compiled" in row for row in rows[3:])
    sizes = " ".join(f"--config.mesh.{axis}={n}" for axis, n in rows[2]["mesh"].items())
    assert (
        f"Fastest of the compiled: --config.train.remat={rows[2]['remat']} {sizes}" in done.stdout
    )


def test_search_needs_no_mesh_that_the_config_itself_could_use():
    options = ["--config=configs/tiny.py", "--topology=v5p:2x2x1", "--config.mesh.fsdp=3"]
    refusal = "4 devices are not divisible by mesh.fsdp=3; 2 or 4 in all would work"
    done = plan(*options)
    assert done.returncode == 1
    assert refusal in done.stderr
    last = planned(*options, "--search", "--best=0")
    assert last["error"] == refusal
    assert last["fits"] is False
    assert last["memory_bytes"] is last["step_seconds"] is last["mesh"] is None
    assert last["parameters"] == sum(last["parameters_by_part"].values())
    assert all(row["memory_bytes"] > 0 and row["step_seconds"] > 0 for row in last["search"])
    assert len(last["search"]) == 10


def test_the_compiled_text_goes_to_a_folder_that_is_not_there_yet(tmp_path):
    file = tmp_path / "plans" / "step.txt"
    options = ["--config=configs/tiny.py", "--topology=v5p:2x2x1", "--compile", f"--hlo={file}"]
    done = run_python(
        TESTS / "tpu_answers.py",
        "1",
        *options,
        "--json",
        cwd=ROOT,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["source"] == "compiler"
    assert file.exists()


def test_a_place_that_the_text_cannot_be_written_to_is_refused_before_anything(tmp_path):
    done = plan("--config=configs/tiny.py", "--compile", f"--hlo={tmp_path}")
    assert done.returncode == 1
    assert f"error: {tmp_path} is a directory; name a file inside it" in done.stderr
    assert not done.stdout


def test_a_missing_compiler_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'qwen3next_jax\[tpu\]'"):
        tpu.devices("v5p:2x2x1")


@pytest.mark.slow
def test_memory_is_what_donated_state_and_loops_come_to():
    layers, size = 8, 2048

    def loss(weights, x):
        def layer(x, weight):
            return jnp.sin(x @ weight), None

        return jax.lax.scan(layer, x, weights)[0].sum()

    def step(weights, x):
        return weights - 0.1 * jax.grad(loss)(weights, x)

    weights, x = ((layers, size, size), jnp.float32), ((size, size), jnp.float32)
    program = tpu_program.compiled(step, "v5p:2x2x1", weights, x, donate_argnums=0)
    memory = tpu.memory(program.memory_analysis())
    # Weights, their gradients, each layer's input and the derivative of its sine; x as it came, as
    # it is on its way, and its gradient.
    of_layers, of_rows = 4 * layers, 3
    expected = (of_layers + of_rows) * 4 * size**2
    assert sum(memory.values()) - memory["program"] == pytest.approx(expected, rel=1e-3)


COMPILES = 1800  # seconds; three minutes where nothing else runs


def compiled(*options):
    """What the compiler says of a run, whose memory the arithmetic predicts to 15%."""
    said, is_so = planned(*options), planned(*options, "--compile", timeout=COMPILES)
    assert (said["source"], is_so["source"]) == ("arithmetic", "compiler")
    assert said["memory_bytes"] == pytest.approx(is_so["memory_bytes"], rel=0.15)
    return is_so


@pytest.mark.slow
def test_the_80b_step_compiles_fits_and_is_estimated_as_documented():
    step = compiled("--config=configs/80b_a3b.py", "--config.model.mtp_steps=0")
    # Figures of docs/plan.md, which are estimates but for the memory, with some room.
    assert step["fits"]
    assert step["memory_bytes"] < 41.6e9
    assert step["estimate"]["fusion_seconds"] + step["estimate"]["kernel_seconds"] < 3.0
    assert sum(step["estimate"]["collective_bytes"].values()) < 200e9


FROZEN = (  # parameters are most of what it holds
    "--config.train.frozen_parameters=('*/mlp/gate_up_proj', '*/mlp/down_proj')",
    "--config.precision.frozen=bfloat16",
    "--config.model.num_experts=128",
    "--config.train.global_batch_size=4",
    "--config.data.num_shards=4",
)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [(), FROZEN], ids=["trained", "frozen experts"])
def test_memory_of_a_model_cut_down(changes):
    compiled(
        "--config=configs/80b_a3b.py",
        "--topology=v5p:2x2x1",
        "--config.mesh.expert=4",
        "--config.model.num_hidden_layers=4",
        "--config.model.hidden_size=1024",
        "--config.model.num_experts=32",
        "--config.model.vocab_size=16384",
        "--config.train.global_batch_size=16",
        "--config.data.num_shards=16",
        *changes,
    )
