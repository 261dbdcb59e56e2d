"""Hugging Face directories as others write them: of transformers' tensors, and an MTP's."""

import functools
import json
import os

import numpy as np
import safetensors.torch
import torch
from oracles import DENSE, SMALL
from safetensors import safe_open
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

torch.set_num_threads(1)


@functools.cache
def transformers_model(name="sparse"):
    """A small model of transformers with all weights random, norms and gates included."""
    changes = {
        "sparse": {"num_hidden_layers": 4},
        "chat": {"num_hidden_layers": 4, "vocab_size": 288},  # holds hf_tokenizer.py's tokens
        "one dense layer, tied": {
            "mlp_only_layers": [1],
            "intermediate_size": 40,
            "tie_word_embeddings": True,
        },
        "dense": DENSE,
    }[name]
    torch.manual_seed(0)
    if name == "dense":
        model = Qwen3ForCausalLM(Qwen3Config(**changes, initializer_range=0.1))
    else:
        config = Qwen3NextConfig(**{**SMALL, **changes}, initializer_range=0.1)
        config._experts_implementation = "eager"
        model = Qwen3NextForCausalLM(config)
    with torch.no_grad():
        for path, p in model.named_parameters():
            if "norm" in path:
                p += torch.empty_like(p).uniform_(-0.5, 0.5)
            elif path.endswith("dt_bias"):
                p.uniform_(-2, 2)
    return model.eval()


def released(directory, *, name="sparse", fused=(), dtype=torch.bfloat16, shards=3, mtp=True):
    """Writes what a released checkpoint holds: an MTP module, and of two dtypes.

    Args:
      directory: does not exist.
      name: of a sparse `transformers_model`.
      fused: of "model" and "mtp", those with their experts in one tensor.
      dtype: of all but A_log.
      shards: how many files.
      mtp: whether there is an MTP module.

    Returns:
      The tensors by name.
    """
    directory.mkdir(parents=True)
    described = {**transformers_model(name).config.to_dict(), "dtype": str(dtype).partition(".")[2]}
    (directory / "config.json").write_text(json.dumps(described))
    tensors = {name: p.detach().clone() for name, p in transformers_model(name).named_parameters()}
    if mtp:
        D = tensors["model.norm.weight"].shape[0]
        tensors["mtp.fc.weight"] = torch.randn(D, 2 * D)
        for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
            tensors[f"mtp.{name}.weight"] = torch.randn(D)
        for key, tensor in list(tensors.items()):
            if key.startswith("model.layers.3."):
                key = key.replace("model.layers.3.", "mtp.layers.0.")
                tensors[key] = torch.randn_like(tensor)
    laid_out = {}
    for name, tensor in tensors.items():
        if not name.endswith("A_log"):
            tensor = tensor.to(dtype)
        if ".experts." in name and name.partition(".")[0] not in fused:
            laid_out |= apart(name, tensor)
        else:
            laid_out[name] = tensor
    write(directory, laid_out, shards)
    (directory / "tokenizer.json").write_text('{"a tokenizer": true}')
    (directory / "README.md").write_text("not for copying")
    return laid_out


def apart(name, tensor):
    """A tensor of all experts as one for each expert and projection."""
    tensors = {}
    for e, expert in enumerate(tensor):
        if name.endswith("gate_up_proj"):
            gate, up = (x.clone() for x in expert.chunk(2))
            tensors[name.replace("gate_up_proj", f"{e}.gate_proj.weight")] = gate
            tensors[name.replace("gate_up_proj", f"{e}.up_proj.weight")] = up
        else:
            tensors[name.replace("down_proj", f"{e}.down_proj.weight")] = expert.clone()
    return tensors


def write(directory, tensors, shards):
    """Writes tensors by the library, dealt out to the files in turn."""
    if shards == 1:
        safetensors.torch.save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        names = sorted(tensors)[i::shards]
        safetensors.torch.save_file({n: tensors[n] for n in names}, directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def read(directory):
    """All tensors of a directory, by the library: name → (dtype, shape, bytes)."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                assert name not in found
                found[name] = bits(opened.get_tensor(name))
    if (directory / "model.safetensors.index.json").exists():
        index = json.loads((directory / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == found.keys()
    return found


def bits(tensor):
    flat = tensor.contiguous().flatten().view(torch.uint8)
    return str(tensor.dtype), tuple(tensor.shape), np.asarray(flat).tobytes()


def change_shard(directory, number, change):
    """Rewrites one file with the library; `change` edits its tensors in place."""
    file = directory / f"model-{number:05}-of-00003.safetensors"
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file)


def broken(directory):
    """A checkpoint with every fault at once; returns what a report of them has to say."""
    names = sorted(released(directory))
    (directory / "model-00002-of-00003.safetensors").unlink()
    lost, scaled = names[3], next(n for n in names[2::3] if n.endswith("gate_proj.weight"))
    assert names[0] == "lm_head.weight"

    def change(tensors):
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()
        tensors["model.layers.9.extra"] = torch.zeros(2)
        del tensors[lost]

    change_shard(directory, 1, change)

    def quantise(tensors):
        tensors[scaled] = tensors[scaled].to(torch.float8_e4m3fn)

    change_shard(directory, 3, quantise)
    third = directory / "model-00003-of-00003.safetensors"
    os.truncate(third, third.stat().st_size - 7)
    size = third.stat().st_size
    return [
        "missing shard: model-00002-of-00003.safetensors",
        f"truncated shard: model-00003-of-00003.safetensors has {size} of {size + 7} bytes",
        f"unsupported dtype: {scaled} is F8_E4M3, expected F32 or BF16",
        f"missing: {lost}, in model-00001-of-00003.safetensors by model.safetensors.index.json",
        "unexpected: model.layers.9.extra [2]",
        "wrong shape: lm_head.weight is [60, 32], expected [61, 32]",
    ]
