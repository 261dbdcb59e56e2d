"""Hugging Face directories: transformers' files here, ours there, faults in one report."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

import hf_directory
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from flax import nnx
from hf_directory import transformers_model
from hf_tensors import dump_tensors
from jax.sharding import NamedSharding
from launched import virtual_devices
from oracles import DENSE, quick_jit, random_model, small_config
from transformers import AutoModelForCausalLM

import qwen3next_jax as q3n
from qwen3next_jax.checkpoint import safetensors_files
from qwen3next_jax.checkpoint.hugging_face import (
    _same_bits,
    hf_config,
    load_tensors,
    open_hf,
    replacing_directory,
)
from qwen3next_jax.checkpoint.parameters import parameter_shapes
from qwen3next_jax.checkpoint.tensor_table import FileLayout, entries
from qwen3next_jax.config import MeshConfig
from qwen3next_jax.model.decoder import Qwen3Next
from qwen3next_jax.parallel.mesh import make_mesh, parameter_shardings

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 70))


@functools.cache
def jitted(graph):
    return quick_jit(lambda params, tokens: nnx.merge(graph, params)(tokens))


def our_logits(model):
    graph, params = nnx.split(model)
    return np.asarray(jitted(graph)(params, jnp.asarray(TOKENS, jnp.int32)))


def their_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS), use_cache=False).logits.float().numpy()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sparse", {"max_shard_size": "100KB"}),
        ("sparse", {"save_original_format": False}),  # experts fused
        ("one dense layer, tied", {}),
        ("dense", {}),
    ],
)
def test_what_transformers_writes_gives_its_logits_here(name, options, tmp_path):
    theirs = transformers_model(name)
    theirs.save_pretrained(tmp_path, **options)
    assert bool(list(tmp_path.glob("*index.json"))) == ("max_shard_size" in options)
    model = q3n.load_hf(tmp_path)
    assert model.config.mtp_steps == 0
    # Two float32 computations in another order; logits are of size 1.
    np.testing.assert_allclose(our_logits(model), their_logits(theirs), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["sparse", "one dense layer, tied", "dense"])
@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_transformers_loads_what_we_write_and_gives_our_logits(name, layout, tmp_path):
    transformers_model(name).save_pretrained(tmp_path / "theirs")
    sparse = name != "dense"
    config = q3n.ModelConfig.from_hf(tmp_path / "theirs")
    model = random_model(dataclasses.replace(config, mtp_steps=int(sparse)), seed=3)
    q3n.save_hf(model, tmp_path / "ours", expert_layout=layout, max_shard_size="100KB")
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, experts_implementation="eager"
    )
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert not [k for k in report["unexpected_keys"] if not k.startswith("mtp.")]
    assert theirs.dtype == torch.float32
    assert type(theirs) is type(transformers_model(name))
    np.testing.assert_allclose(our_logits(model), their_logits(theirs), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_loading_and_saving_changes_no_bit_and_no_name(layout, shards, tmp_path):
    fused = ("model", "mtp") if layout == "fused" else ()
    given = hf_directory.released(tmp_path / "given", fused=fused, shards=shards)
    model = q3n.load_hf(tmp_path / "given")
    assert model.config.mtp_steps == 1
    assert model.dtype == jnp.bfloat16
    q3n.save_hf(model, tmp_path / "new", expert_layout=layout, max_shard_size="150KB")
    written = hf_directory.read(tmp_path / "new")
    assert written == {name: hf_directory.bits(tensor) for name, tensor in given.items()}
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(len(bits) for *_, bits in written.values())
    names = {path.name for path in (tmp_path / "new").iterdir() if "safetensors" not in path.name}
    assert names == {"config.json", "tokenizer.json"}
    shards = list((tmp_path / "new").glob("*.safetensors"))
    assert len(shards) > 1
    assert max(path.stat().st_size for path in shards) < 150_000 + 50_000  # and the headers
    described = json.loads((tmp_path / "new" / "config.json").read_text())
    assert described["architectures"] == ["Qwen3NextForCausalLM"]
    assert described["dtype"] == "bfloat16"  # the key that transformers 5 writes, and its value
    assert "torch_dtype" not in described
    assert q3n.ModelConfig.from_hf(described) == dataclasses.replace(model.config, mtp_steps=0)


def test_experts_may_be_fused_in_the_model_and_apart_in_the_mtp(tmp_path):
    given = hf_directory.released(tmp_path / "given", fused=("model",))
    assert "mtp.layers.0.mlp.experts.0.up_proj.weight" in given
    model = q3n.load_hf(tmp_path / "given")
    q3n.save_hf(model, tmp_path / "new", expert_layout="fused")
    new = hf_directory.read(tmp_path / "new")
    apart = hf_directory.apart(
        "mtp.layers.0.mlp.experts.gate_up_proj",
        torch.frombuffer(
            bytearray(new["mtp.layers.0.mlp.experts.gate_up_proj"][2]), dtype=torch.bfloat16
        ).reshape(7, 40, 32),
    )
    for name, tensor in apart.items():
        assert torch.equal(given[name], tensor), name


def test_a_loaded_model_can_be_told_what_to_compute_in_and_to_recompute(tmp_path):
    hf_directory.released(tmp_path / "given")
    model = q3n.load_hf(tmp_path / "given", dtype="float32")
    model.dtype, model.remat = jnp.dtype("bfloat16"), "layer"
    options = dict(dtype=jnp.bfloat16, remat="layer")
    built = nnx.eval_shape(lambda: q3n.Qwen3Next(model.config, rngs=nnx.Rngs(0), **options))
    built.source = model.source
    assert nnx.graphdef(model) == nnx.graphdef(built)
    model.remat = "full"
    with pytest.raises(ValueError, match="remat='full' is unknown; expected one of none, layer"):
        model(jnp.ones((1, 2), jnp.int32))


def test_a_chosen_dtype_is_that_of_all_but_the_decays(tmp_path):
    hf_directory.released(tmp_path / "given", dtype=torch.float32)
    model = q3n.load_hf(tmp_path / "given", dtype="bfloat16")
    assert model.dtype == jnp.bfloat16
    kept = ("A_log", "dt_bias")
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        assert param.dtype == (jnp.float32 if path[-1] in kept else jnp.bfloat16), path
    q3n.save_hf(model, tmp_path / "new", dtype=jnp.float32)
    new, given = (hf_directory.read(tmp_path / name) for name in ("new", "given"))
    assert {n: x[:2] for n, x in new.items()} == {n: x[:2] for n, x in given.items()}
    assert all(new[n] == given[n] for n in given if n.endswith(kept))


@pytest.mark.parametrize("narrow", ["q_proj", "z_proj"])  # the first and the last of a tensor
def test_a_tensor_of_parameters_in_two_dtypes_rounds_none_of_them(narrow, tmp_path):
    model = random_model(small_config())
    given = model.groups.layers[0].linear_attn
    param = getattr(given, narrow)
    param.set_value(param[...].astype(jnp.bfloat16))
    q3n.save_hf(model, tmp_path / "new")
    read = q3n.load_hf(tmp_path / "new").groups.layers[0].linear_attn
    for name in ("q_proj", "k_proj", "v_proj", "z_proj"):
        assert getattr(read, name).dtype == jnp.float32
        np.testing.assert_array_equal(getattr(read, name)[...], getattr(given, name)[...])


def test_a_quantized_checkpoint_is_told_by_its_config_in_few_words(tmp_path):
    given = tmp_path / "given"
    hf_directory.released(given, shards=1)
    tensors = safetensors.torch.load_file(given / "model.safetensors")
    quantized = {
        name: x.to(torch.float8_e4m3fn) if "_proj" in name else x for name, x in tensors.items()
    }
    count = sum("_proj" in name for name in tensors)
    safetensors.torch.save_file(quantized, given / "model.safetensors")
    config = json.loads((given / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (given / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"quantized \(fp8\), which is not supported") as error:
        q3n.load_hf(given)
    assert f"{count - 1} more tensors of model.safetensors are F8_E4M3" in str(error.value)
    assert len(str(error.value).splitlines()) == 4


def test_a_written_tied_head_is_read_if_it_is_the_embedding(tmp_path):
    model = transformers_model("one dense layer, tied")
    model.config.save_pretrained(tmp_path)
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    hf_directory.write(tmp_path, tensors, 1)
    assert q3n.load_hf(tmp_path).lm_head is None
    tensors["lm_head.weight"][3, 4] += 1
    hf_directory.write(tmp_path, tensors, 1)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs .* tie_word_embeddings"):
        q3n.load_hf(tmp_path)
    tied = Qwen3Next(q3n.ModelConfig.from_hf(tmp_path), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"lm_head\.weight differs .* tie_word_embeddings"):
        load_tensors(tied, tensors)


def test_a_head_is_compared_to_its_last_row():
    embedding = np.zeros((5, 2**22), np.uint8)  # more than are compared at a time
    head = embedding.copy()

    def take(name, view):
        return view({"a": embedding, "b": head}[name])

    assert _same_bits(take, head.shape, "a", "b")
    head[-1, 3] = 1
    assert not _same_bits(take, head.shape, "a", "b")


def test_tensors_are_put_where_the_parameters_were():
    model = random_model(small_config())
    tensors = dump_tensors(nnx.state(model, nnx.Param), model.config)
    graph, params = nnx.split(model)
    shardings = parameter_shardings(params, make_mesh(MeshConfig(data=1, fsdp=1)))
    other = nnx.merge(graph, jax.device_put(jax.tree.map(jnp.zeros_like, params), shardings))
    load_tensors(other, tensors)
    for got, want, sharding in zip(
        *(jax.tree.leaves(x) for x in (nnx.state(other, nnx.Param), params, shardings)), strict=True
    ):
        np.testing.assert_array_equal(got, want)
        assert isinstance(got.sharding, NamedSharding)
        assert got.sharding == sharding


def test_all_faults_come_in_one_report(tmp_path):
    complaints = hf_directory.broken(tmp_path / "given")
    with pytest.raises(ValueError, match="cannot be loaded") as error:
        q3n.load_hf(tmp_path / "given")
    assert sorted(line.strip() for line in str(error.value).splitlines()[1:]) == sorted(complaints)

    config = json.loads((tmp_path / "given" / "config.json").read_text())
    changed = {**config, "model_type": "llama"}
    (tmp_path / "given" / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="model_type='llama' is not supported") as error:
        q3n.load_hf(tmp_path / "given")
    for complaint in complaints[:4]:  # that need no model to be told
        assert complaint in str(error.value)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (
            lambda d: (d / "model.safetensors.index.json").unlink(),
            r"missing: model\.safetensors\.index\.json or model\.safetensors",
        ),
        (lambda d: (d / "model.safetensors.index.json").write_text("{"), "unreadable index"),
        (
            lambda d: (d / "model.safetensors.index.json").write_text(
                '{"weight_map": {"lm_head.weight": null}}'
            ),
            "no file is named for lm_head.weight",
        ),
        (lambda d: (d / "config.json").unlink(), r"config\.json does not exist"),
        (
            lambda d: os.truncate(d / "model-00001-of-00003.safetensors", 100),
            r"truncated shard: model-00001-of-00003\.safetensors ends within its header",
        ),
        (lambda d: os.truncate(d / "model-00001-of-00003.safetensors", 3), "truncated shard"),
        (
            lambda d: (d / "model-00001-of-00003.safetensors").write_bytes(
                (10).to_bytes(8, "little") + b"not JSON.."
            ),
            "header of .* is damaged",
        ),
        (
            lambda d: (d / "model-00004-of-00003.safetensors").write_bytes(b""),
            r"unexpected shard: model-00004-of-00003\.safetensors",
        ),
        (
            lambda d: hf_directory.change_shard(
                d, 1, lambda t: t.update({"model.norm.weight": torch.ones(32)})
            ),
            r"twice: model\.norm\.weight",
        ),
        (
            lambda d: hf_directory.change_shard(
                d,
                1,
                lambda t: t.update(
                    {n: x.float() for n, x in t.items() if n.endswith("1.self_attn.k_proj.weight")}
                ),
            ),
            r"mixed dtypes: model\.layers\.1\.self_attn\.k_proj.* are bfloat16 and float32",
        ),
    ],
)
def test_single_faults_are_named(spoil, complaint, tmp_path):
    hf_directory.released(tmp_path / "given")
    spoil(tmp_path / "given")
    with pytest.raises(ValueError, match=complaint) as error:
        q3n.load_hf(tmp_path / "given")
    assert len(str(error.value).splitlines()) == 2, error.value  # nothing follows from it


def test_a_file_may_be_as_large_as_allowed_and_a_larger_tensor_has_its_own(tmp_path):
    bytes_of = {"a": 16, "b": 16, "c": 16, "d": 40}
    tensors = {name: (np.dtype(np.float32), (n // 4,)) for name, n in bytes_of.items()}
    stored = safetensors_files.create(tmp_path, tensors, 32).stored
    assert [stored[name].file.name[:11] for name in "abcd"] == [
        f"model-0000{i}" for i in (1, 1, 2, 3)
    ]


def test_files_say_that_they_are_pytorch_s_as_transformers_4_demands(tmp_path):
    safetensors_files.create(tmp_path, {"a": (np.dtype(np.float32), (4,))}, "5GB")
    with safetensors.safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_system_that_cannot_set_space_aside_writes_the_same(tmp_path, monkeypatch):
    model = random_model(small_config())
    q3n.save_hf(model, tmp_path / "with")
    monkeypatch.delattr(os, "posix_fallocate")
    q3n.save_hf(model, tmp_path / "without")
    with_it, without = ((tmp_path / name / "model.safetensors") for name in ("with", "without"))
    assert with_it.read_bytes() == without.read_bytes()


def test_a_full_disk_or_an_interrupt_leaves_nothing_behind(tmp_path, monkeypatch):
    model = random_model(small_config())

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", fail)
        with pytest.raises(OSError, match="No space left"):
            q3n.save_hf(model, tmp_path / "new")
    assert not list(tmp_path.iterdir())

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("qwen3next_jax.checkpoint.hugging_face.copy_companions", interrupt)
        with pytest.raises(KeyboardInterrupt):
            q3n.save_hf(model, tmp_path / "new")
    assert not list(tmp_path.iterdir())

    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "precious").touch()
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        q3n.save_hf(model, tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["precious"]
    (tmp_path / "new" / "precious").unlink()
    q3n.save_hf(model, tmp_path / "new")  # an empty one may be there
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_model_keeps_its_tokenizer_whatever_another_is_jitted_with(tmp_path):
    for name in "ab":
        q3n.save_hf(random_model(small_config()), tmp_path / name)
        (tmp_path / name / "tokenizer.json").write_text(name)
    a, b = (q3n.load_hf(tmp_path / name) for name in "ab")
    run = nnx.jit(lambda model, tokens: model(tokens))
    for model in (a, b):
        run(model, jnp.zeros((1, 4), jnp.int32))
    q3n.save_hf(b, tmp_path / "c")
    assert (tmp_path / "c" / "tokenizer.json").read_text() == "b"


def test_a_model_finds_its_tokenizer_again_from_another_directory(tmp_path, monkeypatch):
    q3n.save_hf(random_model(small_config()), tmp_path / "a")
    (tmp_path / "a" / "tokenizer.json").write_text("a")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    model = q3n.load_hf("a")
    monkeypatch.chdir(tmp_path / "elsewhere")
    q3n.save_hf(model, tmp_path / "b")
    assert (tmp_path / "b" / "tokenizer.json").read_text() == "a"


def test_a_model_keeps_the_chat_templates_beside_the_default(tmp_path):
    q3n.save_hf(random_model(small_config()), tmp_path / "a")
    template = pathlib.Path("additional_chat_templates", "tool_use.jinja")
    (tmp_path / "a" / template).parent.mkdir()
    (tmp_path / "a" / template).write_text("{{ messages }}")
    q3n.save_hf(q3n.load_hf(tmp_path / "a"), tmp_path / "b")
    assert (tmp_path / "b" / template).read_text() == "{{ messages }}"


def test_what_a_killed_process_of_the_same_number_left_is_in_nobody_s_way(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)  # as if killed
        patch.setattr("time.sleep", lambda _: None)
        with pytest.raises(KeyboardInterrupt), replacing_directory(tmp_path / "new"):
            raise KeyboardInterrupt
    assert len(list(tmp_path.iterdir())) == 1
    with replacing_directory(tmp_path / "new") as beside:
        (beside / "config.json").touch()
    assert (tmp_path / "new" / "config.json").exists()


def test_a_link_is_followed_and_a_mount_point_refused_before_anything_is_written(tmp_path):
    model = random_model(small_config())
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    q3n.save_hf(model, tmp_path / "link")
    assert (tmp_path / "elsewhere" / "config.json").exists()
    assert (tmp_path / "link").is_symlink()
    with (
        pytest.raises(FileExistsError, match=r"is a mount point, .* a directory inside it"),
        replacing_directory(pathlib.Path("/proc")),
    ):
        pytest.fail("was lent a directory")


def test_the_directory_that_one_is_in_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(FileExistsError, match="is the directory you are in"),
        replacing_directory(pathlib.Path(".")),
    ):
        pytest.fail("was lent a directory")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (dict(expert_layout="stacked"), "expert_layout='stacked' is unknown"),
        (dict(max_shard_size="5 apples"), "max_shard_size='5 apples' is no size"),
        (dict(max_shard_size=0), "max_shard_size=0 is no size"),
        (dict(max_shard_size="0.0001KB"), "max_shard_size='0.0001KB' is no size"),
        (dict(dtype="float16"), "dtype='float16' is not supported"),
    ],
)
def test_impossible_wishes_are_refused(options, complaint, tmp_path):
    with pytest.raises(ValueError, match=complaint):
        q3n.save_hf(random_model(small_config()), tmp_path / "new", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["int8", "float64", "float16", "bf16", np.bool_])
def test_a_dtype_that_would_spoil_the_weights_is_refused(dtype, tmp_path):
    hf_directory.released(tmp_path / "given")
    with pytest.raises(ValueError, match="is not supported; expected 'float32' or 'bfloat16'"):
        q3n.load_hf(tmp_path / "given", dtype=dtype)


@pytest.mark.parametrize("switch", ["zero_centered_norm", "attention_output_gate"])
def test_a_model_that_config_json_cannot_describe_is_refused(switch, tmp_path):
    config = small_config(**{switch: False})
    with pytest.raises(ValueError, match=f"qwen3_next has no {switch}=False"):
        hf_config(config, np.dtype(np.float32))
    with pytest.raises(ValueError, match=f"{switch}=False"):
        q3n.save_hf(random_model(config), tmp_path / "new")
    assert not list(tmp_path.iterdir())


SHARDED = """
import sys
import jax
import numpy as np
from flax import nnx
import qwen3next_jax as q3n
from qwen3next_jax.config import MeshConfig
from qwen3next_jax.parallel.mesh import make_mesh, parameter_shardings

source, target = sys.argv[1:]
mesh = make_mesh(MeshConfig(data=2, fsdp=2))
model = q3n.load_hf(source, mesh=mesh)
plain = q3n.load_hf(source)
params = nnx.state(model, nnx.Param)
wanted = parameter_shardings(params, mesh)
split = 0
for (path, x), (_, sharding), (_, y) in zip(
    nnx.to_flat_state(params), nnx.to_flat_state(wanted),
    nnx.to_flat_state(nnx.state(plain, nnx.Param)), strict=True,
):
    assert x[...].sharding == sharding.get_value(), path
    split += not x[...].sharding.is_fully_replicated
    assert np.asarray(x[...]).tobytes() == np.asarray(y[...]).tobytes(), path
assert split > 20, split
q3n.save_hf(model, target)

apart = q3n.load_hf(source, mesh=mesh, unstacked=True)
for (path, x), (_, y), (_, z) in zip(
    nnx.to_flat_state(nnx.state(apart, nnx.Param)),
    nnx.to_flat_state(nnx.state(plain.unstacked(), nnx.Param)),
    nnx.to_flat_state(nnx.state(model.unstacked(), nnx.Param)), strict=True,
):
    assert np.asarray(x[...]).tobytes() == np.asarray(y[...]).tobytes(), path
    assert x[...].sharding.is_equivalent_to(z[...].sharding, x[...].ndim), path
"""


def test_a_model_with_adapters_is_refused_naming_them(tmp_path):
    model = random_model(small_config())
    model.groups.layers[0].mlp.lora = nnx.Param(jnp.zeros((1, 4)))
    with pytest.raises(ValueError, match=r"merge adapters .*\n  unexpected: .*/mlp/lora \[1, 4\]"):
        q3n.save_hf(model, tmp_path / "written")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"unexpected: .*/mlp/lora \[1, 4\]"):
        dump_tensors(nnx.state(model), model.config)
    with pytest.raises(ValueError, match=r"unexpected: .*/mlp/lora \[1, 4\]"):
        load_tensors(model, {})


def test_a_model_is_loaded_and_saved_split_over_a_mesh(tmp_path):
    given = hf_directory.released(tmp_path / "given")
    environment = os.environ | {"XLA_FLAGS": virtual_devices(4)}
    subprocess.run(
        [sys.executable, "-c", SHARDED, str(tmp_path / "given"), str(tmp_path / "new")],
        check=True,
        env=environment,
    )
    assert hf_directory.read(tmp_path / "new") == {
        name: hf_directory.bits(tensor) for name, tensor in given.items()
    }


@pytest.mark.parametrize("fused", [(), ("model", "mtp")])
@pytest.mark.parametrize("dense", [False, True])
def test_the_table_places_every_number_once_by_views(fused, dense):
    config = small_config(mtp_steps=1, num_hidden_layers=4)
    if dense:
        config = q3n.ModelConfig.from_hf({**DENSE, "mtp_steps": 1})
    places = {path: np.zeros(shape, int) for path, shape in parameter_shapes(config).items()}
    for name, shape, parts in entries(config, FileLayout(fused=fused)):
        tensor, seen = np.zeros(shape, int), 0
        for path, place, view in parts:
            met = view(tensor)
            assert np.shares_memory(met, tensor), name  # a copy would be written in vain
            assert met.shape == places[path][place].shape, name
            met += 1
            places[path][place] += 1
            seen += met.size
        assert seen == tensor.size
        assert (tensor == 1).all(), name
    for path, count in places.items():
        assert (count == 1).all(), path


def test_a_block_reads_only_the_tensors_that_meet_it(tmp_path):
    hf_directory.released(tmp_path / "given")
    hf = open_hf(tmp_path / "given")
    asked = []

    def take(name, view):
        asked.append(name)
        return hf.tensors.take(name, view)

    block = (slice(1, 2), slice(2, 4), slice(1, 2), slice(0, 16), slice(None))
    hf.table.read(take, "groups/layers/1/mlp/gate_up_proj", block, np.dtype(jnp.bfloat16))
    assert asked == [f"model.layers.3.mlp.experts.{e}.up_proj.weight" for e in (2, 3)]
