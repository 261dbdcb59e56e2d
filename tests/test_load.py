"""A run begins with given weights: exactly these, where they belong, and of the same model."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import types

import hf_directory
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from flax import nnx
from launched import virtual_devices
from oracles import random_model
from small_run import is_time, run, small_config, write_corpus

import qwen3next_jax as q3n
from qwen3next_jax.checkpoint import hugging_face
from qwen3next_jax.checkpoint.load import (
    as_trained,
    check_same_model,
    find_checkpoint,
    load_checkpoint,
    load_parameters,
)
from qwen3next_jax.checkpoint.parameters import parameter_shapes
from qwen3next_jax.checkpoint.store import CheckpointStore
from qwen3next_jax.convert import from_hf, to_hf
from qwen3next_jax.model.moe import SparseMoE
from qwen3next_jax.parallel.names import named_leaves
from qwen3next_jax.training.program import abstract_model, new_model

HERE = pathlib.Path(__file__).parent


def wanted(config, dtype="float32"):
    """Descriptions of all parameters on the first device, in their own or one dtype."""
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state = nnx.state(nnx.eval_shape(lambda: q3n.Qwen3Next(config, rngs=nnx.Rngs(0))), nnx.Param)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=one), state)


def assert_same(params, model):
    got, want = (dict(named_leaves(x)) for x in (params, nnx.state(model, nnx.Param)))
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert got[name].dtype == jnp.float32
        np.testing.assert_array_equal(got[name], np.asarray(x, np.float32), err_msg=name)


@pytest.mark.parametrize("kind", ["hugging face", "converted", "step folder"])
def test_parameters_are_those_of_the_checkpoint_in_the_dtype_asked_for(kind, tmp_path):
    hf_directory.released(tmp_path / "hf")
    path = tmp_path / "hf"
    if kind != "hugging face":
        from_hf(tmp_path / "hf", tmp_path / "ours")
        path = tmp_path / "ours" if kind == "converted" else tmp_path / "ours" / "checkpoints" / "0"
    model = q3n.load_hf(tmp_path / "hf")
    assert_same(load_parameters(path, model.config, wanted(model.config)), model)


@pytest.mark.parametrize("name", ["sparse", "one dense layer, tied"])
def test_a_model_is_loaded_unstacked_for_generation(name, tmp_path):
    hf_directory.released(tmp_path / "hf", name=name, mtp=name == "sparse")
    from_hf(tmp_path / "hf", tmp_path / "ours")
    want = dict(named_leaves(nnx.state(q3n.load_hf(tmp_path / "hf").unstacked(), nnx.Param)))
    for path in (tmp_path / "hf", tmp_path / "ours"):
        model = load_checkpoint(path, unstacked=True)
        got = dict(named_leaves(nnx.state(model, nnx.Param)))
        assert got.keys() == want.keys()
        for parameter, x in want.items():
            assert got[parameter].dtype == x.dtype
            np.testing.assert_array_equal(got[parameter], x, err_msg=parameter)
    tokens = jnp.arange(8)[None]
    got, expected = (
        load_checkpoint(path, dtype="float32", unstacked=unstacked)(tokens)
        for unstacked in (True, False)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="without `unstacked`"):
        q3n.save_hf(model, tmp_path / "new")


def test_a_run_is_loaded_to_compute_as_it_trained(tmp_path):
    hf_directory.released(tmp_path / "hf")
    from_hf(tmp_path / "hf", tmp_path / "ours")
    path = tmp_path / "ours" / "config.json"
    precision = {"compute": "float32", "matmul": "highest"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "precision": precision}))
    model = load_checkpoint(tmp_path / "ours")
    assert (model.dtype, model.embed_tokens[...].dtype) == (jnp.float32, jnp.bfloat16)
    assert load_checkpoint(tmp_path / "ours", dtype="bfloat16").dtype == jnp.bfloat16
    with as_trained(find_checkpoint(tmp_path / "ours")):
        assert jax.config.jax_default_matmul_precision == "highest"


@pytest.mark.parametrize("converted", [False, True])
def test_a_step_over_a_loaded_model_compiles_once(converted, tmp_path):
    path = tmp_path / "hf"
    hf_directory.released(path)
    if converted:
        from_hf(path, path := tmp_path / "ours")
    _, state = nnx.split(load_checkpoint(path))

    @jax.jit
    def step(params, count):
        return jax.tree.map(lambda x: x * 2, params), count + 1

    step(*step(state, jnp.zeros((), int)))
    assert step._cache_size() == 1


def test_yarn_is_switched_on_and_off_at_loading(tmp_path, untyped):
    yarn = {"rope_type": "yarn", "factor": 2.0}
    hf_directory.released(tmp_path / "hf")
    from_hf(tmp_path / "hf", tmp_path / "ours")
    for path in (tmp_path / "hf", tmp_path / "ours"):
        given = types.MappingProxyType(yarn)
        assert load_checkpoint(path, rope_scaling=given).config.rope_scaling == yarn
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "rope_scaling": yarn}))
    from_hf(tmp_path / "hf", tmp_path / "long")
    for path in (tmp_path / "hf", tmp_path / "long"):
        assert load_checkpoint(path).config.rope_scaling == yarn
        assert load_checkpoint(path, rope_scaling={}).config.rope_scaling is None
        for wrong in ("yarn", ""):
            with pytest.raises(ValueError, match=f"rope_scaling='{wrong}' must be a mapping"):
                load_checkpoint(path, rope_scaling=wrong)


def test_a_model_with_a_replaced_module_begins_with_a_checkpoint_of_its_own_kind_only(tmp_path):
    hf_directory.released(tmp_path / "hf")
    from_hf(tmp_path / "hf", tmp_path / "ours")
    model = q3n.load_hf(tmp_path / "hf")
    layers = model.groups.layers
    layers[0].linear_attn.out_proj = nnx.Param(jnp.ones((2, 3)), axes=("key_heads", "norm"))
    _, params = nnx.split(model)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    run = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "float32", sharding=one), params)
    wrong = r"(?s)does not fit the run's model:.* groups/layers/0/linear_attn/out_proj is .*, ex"
    for kind in ("hf", "ours"):
        with pytest.raises(ValueError, match=wrong):
            load_parameters(tmp_path / kind, model.config, run)
    store = CheckpointStore(tmp_path / "ours" / "checkpoints", keep=2)
    store.save(1, {"params": params}, {})
    store.close()
    assert_same(load_parameters(tmp_path / "ours", model.config, run), model)


@pytest.mark.parametrize("kind", ["hugging face", "converted"])
@pytest.mark.parametrize("mtp", [False, True])
def test_new_parameters_take_the_place_of_those_that_the_checkpoint_lacks_or_has(
    mtp, kind, tmp_path
):
    given = tmp_path / "hf"
    hf_directory.released(given, mtp=mtp)
    if kind == "converted":
        from_hf(given, tmp_path / "ours")
        given = tmp_path / "ours"
    found = load_checkpoint(given)
    config = dataclasses.replace(found.config, mtp_steps=1)
    run = wanted(config)
    drawn = random_model(config)
    paths = named_leaves(nnx.state(drawn, nnx.Param))
    new = {path: x for path, x in paths if path.startswith("mtp/")}
    got = load_parameters(given, config, run, new)
    drawn.embed_tokens, drawn.groups = found.embed_tokens, found.groups
    drawn.norm, drawn.lm_head = found.norm, found.lm_head
    assert_same(got, drawn)
    if not mtp:
        with pytest.raises(ValueError, match=r"no MTP module; .*\.new_parameters=\('mtp/\*',\)"):
            load_parameters(given, config, run)
        del new["mtp/fc"]
        with pytest.raises(ValueError, match="does not fit the run's model:\n  missing: mtp/fc "):
            load_parameters(given, config, run, new)


def test_a_layer_extended_by_a_parameter_begins_with_released_weights(tmp_path, monkeypatch):
    hf_directory.released(tmp_path / "given")
    released = q3n.load_hf(tmp_path / "given")
    init = SparseMoE.__init__

    def extended(self, *args, **options):
        init(self, *args, **options)
        self.extra = nnx.Param(jnp.zeros(3), axes=("norm",))

    monkeypatch.setattr(SparseMoE, "__init__", extended)
    monkeypatch.setattr(hugging_face, "parameter_shapes", parameter_shapes.__wrapped__)  # uncached
    run = wanted(released.config)
    new = {n: jnp.ones(x.shape) for n, x in named_leaves(run) if n.endswith("/extra")}
    assert len(new) == 3  # two layers and the MTP module
    check_same_model(tmp_path / "given", released.config, new)
    got = dict(named_leaves(load_parameters(tmp_path / "given", released.config, run, new)))
    assert all(got.pop(name) is x for name, x in new.items())
    assert_same(got, released)
    with pytest.raises(ValueError, match=r"No tensor of Hugging Face's models holds .*/extra"):
        load_parameters(tmp_path / "given", released.config, run)


def test_all_that_differs_from_the_checkpoint_is_named(tmp_path):
    hf_directory.released(tmp_path / "with")
    hf_directory.released(tmp_path / "without", mtp=False)
    config = q3n.ModelConfig.from_hf(tmp_path / "with")  # mtp_steps is not in the file
    with pytest.raises(ValueError, match=r"holds an MTP module; set it to 1") as error:
        check_same_model(tmp_path / "with", config)
    assert str(error.value).count("model.") == 1
    check_same_model(tmp_path / "without", config)
    changed = {**config.to_hf(), "hidden_size": 48, "rope_theta": 5.0, "mtp_steps": 2}
    changed = q3n.ModelConfig.from_hf(changed)
    with pytest.raises(ValueError, match=r"model\.hidden_size=48, in the checkpoint 32") as error:
        load_parameters(tmp_path / "without", changed, wanted(changed))
    assert "model.rope_theta=5.0, in the checkpoint" in str(error.value)
    assert "model.mtp_steps=2, but the checkpoint holds no MTP module; set it to 0" in str(
        error.value
    )
    # What a run may choose: how far it reads, and how strongly it balances its experts.
    free = {"max_position_embeddings": 9999, "router_aux_loss_coef": 0.5, "mtp_steps": 2,
            "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}  # fmt: skip
    check_same_model(tmp_path / "with", q3n.ModelConfig.from_hf({**config.to_hf(), **free}))


# By hand: what changes the meaning of weights that fit all the same.
ANOTHER_MEANING = {
    "rope_theta": 5.0, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5, "norm_topk_prob": False,
    "num_experts_per_tok": 2, "zero_centered_norm": False, "attention_output_gate": False,
    "tie_word_embeddings": False, "intermediate_size": 48, "mlp_only_layers": (0,),
    "layer_types": ("full_attention", "linear_attention"),
}  # fmt: skip


def test_what_changes_the_meaning_of_weights_is_no_run_s_to_choose(tmp_path):
    hf_directory.released(tmp_path / "hf", name="one dense layer, tied", mtp=False)
    config = q3n.ModelConfig.from_hf(tmp_path / "hf")
    for key, value in ANOTHER_MEANING.items():
        changed = dataclasses.replace(config, **{key: value})
        with pytest.raises(ValueError, match=rf"\n  model\.{key}=") as error:
            check_same_model(tmp_path / "hf", changed)
        assert str(error.value).count("model.") == 1
    # The same layers may be said otherwise; a width that none has says nothing.
    check_same_model(tmp_path / "hf", dataclasses.replace(config, layer_types=config.mixers))
    hf_directory.released(tmp_path / "sparse", mtp=False)
    sparse = q3n.ModelConfig.from_hf(tmp_path / "sparse")
    check_same_model(tmp_path / "sparse", dataclasses.replace(sparse, intermediate_size=48))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "texts")


@pytest.fixture(scope="module")
def earlier(corpus, tmp_path_factory):
    """A run with checkpoints of steps 3 and 4."""
    workdir = tmp_path_factory.mktemp("earlier")
    run(small_config(corpus, train__num_steps=4), workdir)
    return workdir


def steps(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not is_time(k)} for line in lines]


@pytest.mark.slow
def test_a_run_begins_with_given_weights_and_goes_on_with_its_own(earlier, corpus, tmp_path):
    given = tmp_path / "given"
    shutil.copytree(earlier, given)
    tokenizer = str(given / "tokenizer.model")

    def config(num_steps):
        return small_config(
            corpus,
            train__initial_checkpoint=str(given / "checkpoints" / "3"),
            train__num_steps=num_steps,
            optimizer__schedule="constant",
            data__tokenizer=tokenizer,
            train__seed=5,
            optimizer__warmup_steps=0,
        )

    run(config(4), tmp_path / "whole")
    # A step with the rate 0 shows what the run began with.
    still = small_config(
        corpus,
        train__initial_checkpoint=str(given / "checkpoints" / "3"),
        train__num_steps=1,
        data__tokenizer=tokenizer,
        train__seed=5,
        optimizer__learning_rate=0.0,
    )
    model, _ = run(still, tmp_path / "still")
    assert_same(nnx.state(model, nnx.Param), load_checkpoint(given / "checkpoints" / "3"))
    assert steps(tmp_path / "still")[0]["loss"] == steps(tmp_path / "whole")[0]["loss"]
    assert steps(tmp_path / "whole")[0]["loss"] < steps(earlier)[0]["loss"] - 0.1

    # The optimizer is fresh: its count says 1 after the first step.
    reader = CheckpointStore(tmp_path / "still" / "checkpoints")
    counts = [name for name in reader.describe(1)[0] if name.endswith("count")]
    assert counts
    shapes = {n: jax.ShapeDtypeStruct((), jnp.int32) for n in counts}
    found, _ = reader.restore(1, shapes, partial=True)
    assert set(map(int, found.values())) == {1}
    reader.close()

    run(config(3), tmp_path / "parts")
    given.rename(tmp_path / "away")  # what a run goes on with is its own
    (given).mkdir()
    shutil.copy(tmp_path / "away" / "tokenizer.model", given)
    run(config(4), tmp_path / "parts")
    # Evaluations differ: the shorter run had one at its end.
    assert [x for x in steps(tmp_path / "parts") if "loss" in x] == [
        x for x in steps(tmp_path / "whole") if "loss" in x
    ]


@pytest.mark.slow
def test_a_run_draws_the_parameters_that_are_to_be_new(earlier, corpus, tmp_path):
    config = small_config(
        corpus,
        train__initial_checkpoint=str(earlier),
        train__new_parameters=("mtp/*", "*/router"),
        train__num_steps=1,
        train__seed=5,
        data__tokenizer=str(earlier / "tokenizer.model"),
        optimizer__learning_rate=0.0,  # so that its checkpoint holds what it began with
    )
    models = run(config, tmp_path)[0], new_model(config), load_checkpoint(earlier)
    began, drawn, read = (dict(named_leaves(nnx.state(model, nnx.Param))) for model in models)
    for path, x in began.items():
        new = path.startswith("mtp/") or path.endswith("/router")
        expected = (drawn if new else read)[path]
        # The run compiles what it draws, and the last bit may differ.
        np.testing.assert_allclose(x, expected, rtol=1e-6 if new else 0, err_msg=path)
    assert not (drawn["mtp/fc"] == read["mtp/fc"]).any()


@pytest.mark.slow
def test_a_fine_tune_gives_back_what_it_froze_bit_for_bit(corpus, tmp_path, caplog):
    """From bfloat16 files and back, through a resumption on four devices."""
    given, exported = tmp_path / "given", tmp_path / "exported"
    config = small_config(corpus)
    model = random_model(config.model)
    q3n.save_hf(model, given, dtype="bfloat16")
    changes = dict(
        train__initial_checkpoint=str(given),
        train__frozen_parameters=(
            "*/mlp/gate_up_proj",
            "*/mlp/down_proj",
            "embed_tokens",
            "*/z_proj",
        ),
        train__checkpoint_every=0,
        precision__frozen="bfloat16",
        precision__compute="bfloat16",
    )
    with caplog.at_level("INFO", logger="absl"):
        run(small_config(corpus, **changes, train__num_steps=2), tmp_path / "run")
    frozen = ("mlp/gate_up_proj", "mlp/down_proj", "embed_tokens", "z_proj")
    size = sum(
        x.size for name, x in named_leaves(nnx.state(model, nnx.Param)) if name.endswith(frozen)
    )
    assert f" parameters ({size:,} frozen), " in caplog.text
    changes |= dict(train__num_steps=4, mesh__data=1, mesh__fsdp=2, mesh__expert=2)
    items = [f"{key.replace('__', '.')}={value!r}" for key, value in changes.items()]
    subprocess.run(
        [sys.executable, HERE / "small_run.py", corpus, tmp_path / "run", *items],
        env=os.environ | {"XLA_FLAGS": virtual_devices(4), "JAX_PLATFORMS": "cpu"},
        check=True,
    )
    to_hf(tmp_path / "run", exported)
    # A tensor that holds frozen and trained parameters (q, k, v and z) rounds none of them.
    trained = load_checkpoint(tmp_path / "run").groups.layers[0].linear_attn
    read = q3n.load_hf(exported).groups.layers[0].linear_attn
    assert trained.z_proj.dtype == jnp.bfloat16
    for name in ("q_proj", "v_proj", "z_proj"):
        np.testing.assert_array_equal(getattr(read, name)[...], getattr(trained, name)[...])
    before, after = (
        safetensors.torch.load_file(directory / "model.safetensors")
        for directory in (given, exported)
    )
    assert before.keys() == after.keys()
    for name, x in before.items():
        frozen = ".mlp.experts." in name or "embed_tokens" in name
        assert after[name].dtype == (torch.bfloat16 if frozen else torch.float32), name
        assert torch.equal(after[name].float(), x.float()) == frozen, name


def test_parameters_both_new_and_frozen_are_refused_by_name(corpus, tmp_path):
    config = small_config(
        corpus,
        train__initial_checkpoint=str(tmp_path / "earlier"),
        train__new_parameters=("mtp/*",),
        train__frozen_parameters=("*/mlp/down_proj",),
    )
    with pytest.raises(ValueError, match=r"both match mtp/layer/mlp/down_proj, which would stay"):
        run(config, tmp_path / "new")
    assert not (tmp_path / "new" / "config.json").exists()


def test_new_parameters_that_the_model_does_not_have_are_named(corpus, tmp_path):
    config = small_config(
        corpus,
        train__initial_checkpoint=str(tmp_path / "earlier"),
        train__new_parameters=("mtp/*", "mpt/*"),
    )
    with pytest.raises(ValueError, match=r"has \['mpt/\*'\], which match no parameter; .*mtp/fc"):
        run(config, tmp_path / "new")
    assert not (tmp_path / "new" / "config.json").exists()


def test_another_model_is_refused_before_the_directory_is_this_runs(corpus, tmp_path):
    earlier = small_config(corpus)
    store = CheckpointStore(tmp_path / "earlier" / "checkpoints", keep=2)
    store.save(1, {"params": nnx.state(random_model(earlier.model), nnx.Param)}, {})
    store.close()
    (tmp_path / "earlier" / "config.json").write_text(json.dumps(earlier.to_dict()))
    config = small_config(
        corpus, train__initial_checkpoint=str(tmp_path / "earlier"), model__num_experts=8
    )
    with pytest.raises(ValueError, match=r"model\.num_experts=8, in the checkpoint 4"):
        run(config, tmp_path / "new")
    assert not (tmp_path / "new" / "config.json").exists()


@pytest.mark.slow
def test_a_split_model_begins_with_the_same_weights(earlier, corpus, tmp_path):
    """On eight virtual devices, where each parameter is read into its own slices."""
    changes = [
        f"train.initial_checkpoint={str(earlier)!r}",
        "train.num_steps=2",
        "mesh.fsdp=4",
        "mesh.data=2",
        f"data.tokenizer={str(earlier / 'tokenizer.model')!r}",
    ]
    command = [sys.executable, HERE / "small_run.py", corpus, tmp_path / "eight", *changes]
    subprocess.run(command, env=os.environ | {"XLA_FLAGS": virtual_devices(8)}, check=True)
    one = small_config(
        corpus,
        train__initial_checkpoint=str(earlier),
        train__num_steps=2,
        data__tokenizer=str(earlier / "tokenizer.model"),
    )
    run(one, tmp_path / "one")
    assert parameter_shapes(one.model).keys() == dict(named_leaves(abstract_model(one)[1])).keys()
    for a, b in zip(steps(tmp_path / "eight"), steps(tmp_path / "one"), strict=True):
        for key in a:
            # float32 sums in another order; None stands where a layer has no such number
            left, right = np.array(a[key], float), np.array(b[key], float)
            np.testing.assert_allclose(left, right, rtol=1e-4, err_msg=key)
