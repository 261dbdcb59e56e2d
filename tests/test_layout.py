"""Runs that do not fit their mesh are refused with sizes that would."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from run_dicts import run_dict

from qwen3next_jax.config import RunConfig
from qwen3next_jax.parallel.layout import check_copies, check_fits, describe_layout

ONE = dict(data=1, fsdp=1, expert=1, context=1, tensor=1)


def problems(sizes, **changes):
    changes = {"train__sequence_length": 512, "train__global_batch_size": 8, **changes}
    try:
        check_fits(RunConfig.from_dict(run_dict(**changes)), {**ONE, **sizes})
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("sizes", "changes", "message"),
    [
        (dict(expert=3), {}, r"num_experts=16 is not divisible by mesh.expert=3; 2 or 4 would"),
        (
            dict(tensor=3),
            {},
            r"num_attention_heads=4, .*linear_num_key_heads=2, .* mesh.tensor=3; "
            r"1 or 2 would work",
        ),
        (
            dict(tensor=2),
            {"model__num_key_value_heads": 3, "model__num_attention_heads": 6},
            r"num_key_value_heads=3 and mesh.tensor=2 do not divide one another; 1 or 3 would",
        ),
        (
            dict(tensor=6),
            {"model__num_key_value_heads": 4, "model__num_attention_heads": 12},
            r"num_key_value_heads=4 and mesh.tensor=6 do not divide one another; 2 or 4 would",
        ),
        (
            dict(context=8),
            {"train__sequence_length": 640},
            r"sequence_length=640 is not divisible by mesh.context=8 times 64 tokens.*; a length "
            r"of 512 or 1024 would work, or mesh.context=5 or 10",
        ),
        (
            dict(fsdp=4, expert=4),
            {},
            r"global_batch_size=8 is not divisible by mesh.fsdp=4 x "
            r"mesh.expert=4; 4 or 8 in all would work",
        ),
        (
            dict(data=8),
            {"train__gradient_accumulation_steps": 2},
            r"size / train.gradient_accumulation_steps=4 is not divisible by mesh.data=8",
        ),
        (
            dict(fsdp=3),
            {"train__global_batch_size": 12},
            r"model.hidden_size=128 is not divisible by mesh.fsdp=3; 2 or 4 in all would work",
        ),
        (
            dict(expert=16),
            {"train__global_batch_size": 16},
            r"moe_buffer_factor=-1 makes room for 16 times an even load.*name a "
            r"factor, such as 2.0",
        ),
    ],
)
def test_a_run_that_does_not_fit_is_told_what_would(sizes, changes, message):
    assert problems({}, **changes) == ""
    assert re.search(message, problems(sizes, **changes)), problems(sizes, **changes)


def test_the_worst_case_of_eight_expert_ways_fits():
    assert problems(dict(expert=8)) == ""


def test_without_delta_layers_a_device_s_tokens_need_only_split_into_two_pieces():
    changes = {"model__layer_types": ("full_attention",), "model__num_hidden_layers": 1}
    assert problems(dict(context=8), **changes, train__sequence_length=640 + 16) == ""
    found = problems(dict(context=8), **changes, train__sequence_length=640 + 8)
    assert "times 2 tokens, attention's pieces; a length of 640 or 656 would work" in found


def test_all_that_does_not_fit_is_named_at_once():
    found = problems(dict(expert=3, tensor=3, context=7))
    for part in ("num_experts=16", "num_attention_heads=4", "sequence_length=512"):
        assert part in found


def abstract(name, shape, *spec):
    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "fsdp"))
    return name, jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))


def test_large_arrays_are_reported_and_too_many_copies_are_refused():
    sizes = {**ONE, "data": 2, "fsdp": 4}
    arrays = [
        abstract("experts", (1024, 4096), "fsdp"),
        abstract("norm", (4096,)),
        abstract("whole", (512, 1024)),
    ]
    check_copies(arrays, sizes, max_replicated=0.5)
    text = describe_layout(arrays, sizes)
    assert "experts: float32[1024, 4096] split P('fsdp', None), 4.2 MB a device" in text.replace(
        "PartitionSpec", "P"
    ).replace("P('fsdp',)", "P('fsdp', None)")
    assert "norm" not in text
    # 2 MiB are held whole, of which a quarter would do; 6 MiB and the norm are held in all.
    assert text.endswith("In all 6.3 MB a device, of which 1.6 MB copies")
    with pytest.raises(ValueError, match=r"25% of each device's 6.3 MB are copies") as error:
        check_copies(arrays, sizes, max_replicated=0.2)
    assert "\n  whole: float32[512, 1024] split" in str(error.value)
    assert "experts" not in str(error.value).split("max_replicated:")[1]
