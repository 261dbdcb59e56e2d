"""Weights in FP8: the product of each with its blocks' scales, there and in transformers."""

import json

import hf_directory
import numpy as np
import pytest
import safetensors.torch
import torch
from test_hugging_face import our_logits, their_logits
from transformers import AutoModelForCausalLM

import qwen3next_jax as q3n
from qwen3next_jax.checkpoint import fp8
from qwen3next_jax.checkpoint.hugging_face import open_hf
from qwen3next_jax.convert import main


def released(directory, block, *, fused=(), scale_dtype=torch.bfloat16, dtype=torch.bfloat16):
    """Writes a checkpoint whose projections are FP8, but one of those that make up a parameter.

    Returns:
      The tensors by name, those in FP8 as their exact products in float32.
    """
    tensors = hf_directory.released(directory, fused=fused, dtype=dtype, shards=1)
    stored, products = {}, {}
    for name, tensor in tensors.items():
        stored[name] = products[name] = tensor
        if "_proj" not in name or name == "model.layers.1.linear_attn.out_proj.weight":
            continue
        *experts, rows, columns = tensor.shape
        blocks = -(-rows // block[0]), -(-columns // block[1])
        padded = torch.zeros(*experts, blocks[0] * block[0], blocks[1] * block[1])
        padded[..., :rows, :columns] = tensor
        blocks = padded.unflatten(-1, (-1, block[1])).unflatten(-3, (-1, block[0]))
        scale = (blocks.abs().amax((-3, -1)) / 448).to(scale_dtype)
        each = scale.float()[..., :, None, :, None].expand(blocks.shape)
        each = each.flatten(-4, -3).flatten(-2, -1)[..., :rows, :columns]
        stored[name] = (tensor.float() / each).to(torch.float8_e4m3fn)
        stored[name + "_scale_inv"] = scale
        products[name] = stored[name].float() * each
    assert len(stored) > len(tensors) + 20
    safetensors.torch.save_file(stored, directory / "model.safetensors", {"format": "pt"})
    edit_config(directory, quant_method="fp8", weight_block_size=list(block))
    return products


def edit_config(directory, **quantization):
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"activation_scheme": "dynamic", **quantization}
    (directory / "config.json").write_text(json.dumps(config))


def edit_tensors(directory, change):
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("block", "fused"), [((2, 4), ()), ((16, 7), ("model", "mtp"))])
def test_weights_are_the_products_to_the_bit(block, fused, scale_dtype, dtype, tmp_path):
    given = released(tmp_path / "given", block, fused=fused, scale_dtype=scale_dtype)
    model = q3n.load_hf(tmp_path / "given", dtype=dtype)
    q3n.save_hf(model, tmp_path / "new", expert_layout="fused" if fused else "per_expert")
    wanted = {
        name: hf_directory.bits(x if "A_log" in name or "dt_bias" in name else x.to(model_dtype))
        for model_dtype in [torch.float32 if dtype else torch.bfloat16]
        for name, x in given.items()
    }
    assert hf_directory.read(tmp_path / "new") == wanted
    assert "quantization_config" not in json.loads((tmp_path / "new/config.json").read_text())


def test_transformers_reads_the_same_model(tmp_path):
    given = tmp_path / "given"
    released(given, (2, 4))
    theirs = AutoModelForCausalLM.from_pretrained(
        given, dtype=torch.float32, experts_implementation="eager"
    )
    ours = q3n.load_hf(given, dtype="float32")
    np.testing.assert_allclose(our_logits(ours), their_logits(theirs), atol=1e-4, rtol=0)


def test_conversion_reads_them_too_and_writes_bfloat16(tmp_path):
    given = released(tmp_path / "given", (2, 4))
    main(["from-hf", str(tmp_path / "given"), str(tmp_path / "ours")])
    main(["to-hf", str(tmp_path / "ours"), str(tmp_path / "new")])
    kept = "A_log"
    assert hf_directory.read(tmp_path / "new") == {
        name: hf_directory.bits(x if kept in name else x.to(torch.bfloat16))
        for name, x in given.items()
    }


def test_a_product_is_computed_once_for_each_parameter_that_has_a_part_in_it(tmp_path, monkeypatch):
    given = tmp_path / "given"
    released(given, (2, 4))
    computed, product = [], fp8._product
    monkeypatch.setattr(fp8, "_product", lambda *args: computed.append(1) or product(*args))
    hf = open_hf(given)
    in_fp8 = {name for name in hf.tensors if name + "_scale_inv" in hf.tensors._files}
    q3n.load_hf(given)
    assert len(computed) == sum(
        len(in_fp8.intersection(hf.table.tensors_of(path))) for path in hf.table.parameters
    )


def test_all_faults_of_the_scales_come_in_one_report(tmp_path):
    given = tmp_path / "given"
    released(given, (2, 4))
    expert = "model.layers.0.mlp.experts.0"

    def change(tensors):
        del tensors[f"{expert}.up_proj.weight_scale_inv"]
        name = f"{expert}.gate_proj.weight_scale_inv"
        tensors[name] = tensors[name][:-1].clone()
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
        tensors["model.embed_tokens.weight_scale_inv"] = torch.ones(31, 8)

    edit_tensors(given, change)
    with pytest.raises(ValueError, match="cannot be loaded") as error:
        q3n.load_hf(given)
    assert sorted(line.strip() for line in str(error.value).splitlines()[1:]) == [
        f"missing: {expert}.up_proj.weight_scale_inv [10, 8]",
        "unexpected: model.embed_tokens.weight_scale_inv [31, 8]",
        "unsupported dtype: model.norm.weight [32] is no matrix, but F8_E4M3",
        f"wrong shape: {expert}.gate_proj.weight_scale_inv is [9, 8], expected [10, 8]",
    ]


def test_a_lost_shard_is_reported_once(tmp_path):
    given = tmp_path / "given"
    released(given, (2, 4))
    tensors = safetensors.torch.load_file(given / "model.safetensors")
    (given / "model.safetensors").unlink()
    hf_directory.write(given, tensors, 2)  # scales and their weights are in different files
    (given / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="missing shard") as error:
        q3n.load_hf(given)
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize("block", [None, [128], [128, 0], 128, [128, 128.0], [True, 128]])
def test_other_blocks_are_refused(block, tmp_path):
    given = tmp_path / "given"
    released(given, (2, 4))
    edit_config(given, quant_method="fp8", weight_block_size=block)
    with pytest.raises(ValueError, match=r"only with \[rows, columns\]; take .* in bfloat16"):
        q3n.load_hf(given)
    with pytest.raises(ValueError, match=r"quantized \(fp8\)"):
        q3n.ModelConfig.from_hf(given)
