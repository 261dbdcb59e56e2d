"""Configs: two dialects in, one out; everything wrong is named, with what would be right."""

import copy
import dataclasses
import json

import numpy as np
import pytest
from oracles import RELEASED, SMALL, small_config
from run_dicts import run_dict
from transformers import Qwen3Config, Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRotaryEmbedding

from configs import tiny
from qwen3next_jax.config import ModelConfig, RunConfig
from qwen3next_jax.model.rope import _frequencies as rope_frequencies


def test_the_released_dialect_is_read():
    config = ModelConfig.from_hf(RELEASED)
    assert (config.num_hidden_layers, config.hidden_size, config.num_experts) == (48, 2048, 512)
    assert config.mixers == (("linear_attention",) * 3 + ("full_attention",)) * 12
    assert config.group == tuple((mixer, True) for mixer in config.mixers[:4])
    assert config.rotary_dim == 64
    assert config.rope_theta == 1e7
    assert config.rope_scaling is None
    assert config.mtp_steps == 0


def test_the_dialect_of_transformers_5_means_the_same():
    written = Qwen3NextConfig(**RELEASED).to_dict()
    assert "rope_theta" not in written, "transformers no longer writes the newer dialect"
    assert "full_attention_interval" not in written
    assert ModelConfig.from_hf(written) == ModelConfig.from_hf(RELEASED)


def test_yarn_is_read_from_both_dialects():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144}
    released = ModelConfig.from_hf({**RELEASED, "rope_scaling": yarn})
    written = Qwen3NextConfig(**{**RELEASED, "rope_scaling": dict(yarn)}).to_dict()
    newer = ModelConfig.from_hf(written)
    for config in (released, newer):
        assert {**yarn, **config.rope_scaling} == dict(config.rope_scaling)
        assert (config.rope_theta, config.partial_rotary_factor) == (1e7, 0.25)


@pytest.mark.parametrize("key", ["rope_type", "type"])
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_rotary_keys_mean_what_transformers_takes_them_for_wherever_they_stand(name, key):
    rope = {key: "yarn", "factor": 4.0, "original_max_position_embeddings": 262144}
    inside = {"rope_theta": 5e5, "partial_rotary_factor": 0.5}
    for given in ({**RELEASED, name: rope}, {**RELEASED, name: {**rope, **inside}}):
        theirs = Qwen3NextConfig(**json.loads(json.dumps(given))).rope_parameters
        ours = ModelConfig.from_hf(given)
        assert ours.rope_scaling is not None
        ours = {
            "rope_theta": ours.rope_theta,
            **ours.rope_scaling,
            "partial_rotary_factor": ours.partial_rotary_factor,
        }
        assert {"rope_type": "yarn", **ours} == theirs
    for given in ({**RELEASED, name: {key: "default"}}, {**RELEASED, name: {}}):
        assert ModelConfig.from_hf(given) == ModelConfig.from_hf(RELEASED)


def test_an_original_length_beside_the_scaling_precedes_the_one_inside_as_in_transformers():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    given = {**SMALL, "max_position_embeddings": 256, "rope_scaling": yarn}
    given["original_max_position_embeddings"] = 32
    ours = ModelConfig.from_hf(given)
    assert (ours.original_context, ours.context_length) == (32, 256)
    theirs = Qwen3NextRotaryEmbedding(Qwen3NextConfig(**json.loads(json.dumps(given))))
    np.testing.assert_allclose(rope_frequencies(ours)[0], theirs.inv_freq, rtol=1e-6)
    without = ModelConfig.from_hf({**given, "rope_scaling": None})
    assert without.to_hf()["original_max_position_embeddings"] == 32  # and means nothing
    for scaled in (ours, dataclasses.replace(without, rope_scaling=without.yarn(4.0))):
        again = ModelConfig.from_hf(scaled.to_hf())
        assert again.rope_scaling == scaled.rope_scaling
        assert again.context_length == scaled.context_length


def test_rotary_keys_that_say_what_is_so_anyway_are_taken():
    yarn = {"rope_type": "yarn", "factor": 4.0}
    wordy = {**yarn, "truncate": True, "mscale": None, "attention_factor": None}
    expected = ModelConfig.from_hf({**SMALL, "rope_scaling": yarn})
    assert ModelConfig.from_hf({**SMALL, "rope_scaling": wordy}) == expected


def test_a_null_counts_as_absent_where_one_value_alone_is_supported():
    null = dict.fromkeys(("hidden_act", "attention_bias", "attention_dropout"))
    assert ModelConfig.from_hf({**SMALL, **null}) == ModelConfig.from_hf(SMALL)


def test_the_context_is_what_was_trained_or_what_yarn_makes_of_it():
    def context(**changes):
        return ModelConfig.from_hf({**RELEASED, **changes}).context_length

    def yarn(factor, **more):
        return {"rope_type": "yarn", "factor": factor, **more}

    original = {"original_max_position_embeddings": 262_144}
    assert context() == 262_144
    assert context(rope_scaling=yarn(4.0, **original)) == 1_048_576 >= 1_010_000
    assert context(rope_scaling=yarn(2)) == 524_288  # the original length is the config's
    # Some files state the longer context as well; it is not scaled twice.
    longer = {"max_position_embeddings": 1_010_000}
    assert context(**longer, rope_scaling=yarn(3.0, **original)) == 1_010_000
    assert context(**longer, rope_scaling=yarn(4.0, **original)) == 1_048_576
    assert isinstance(context(rope_scaling=yarn(2.5)), int)


def test_yarn_lengthens_the_rows_that_a_run_may_have():
    given = run_dict(train__sequence_length=10_000)
    with pytest.raises(ValueError, match=r"of 4096 tokens; .*rope_scaling='\{.*'") as told:
        RunConfig.from_dict(given)
    # What it says works.
    given["model"]["rope_scaling"] = json.loads(str(told.value).split("'")[-2])
    assert RunConfig.from_dict(given).model.context_length == 3 * 4096
    given["train"]["sequence_length"] = 20_000
    with pytest.raises(ValueError, match=r"of 12288 tokens; .*or raise model.rope_scaling.factor"):
        RunConfig.from_dict(given)


@pytest.mark.parametrize("way", ["assigned", "updated"])
def test_a_config_of_ones_own_has_yarn_by_a_dict(way):
    config = tiny.get_config()
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    if way == "assigned":
        config.model.rope_scaling = yarn
    else:
        config.model.update(rope_scaling=yarn)
    assert RunConfig.from_dict(config).model.rope_scaling == yarn
    assert RunConfig.from_dict(tiny.get_config()).model.rope_scaling is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": None}}, "a factor, a number of at least 1"),
        ({"rope_scaling": {"type": "yarn", "factor": "4"}}, "a factor, a number of at least 1"),
        ({"rope_scaling": {"type": "yarn", "factor": 0}}, "a factor, a number of at least 1"),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn' must be a mapping"),
        ({"rope_theta": 0.0}, "rope_theta=0.0 must be a positive number"),
    ],
)
def test_rotary_keys_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf({**SMALL, **changes})


def test_numbers_of_numpy_are_taken_as_pythons():
    swept = ModelConfig.from_hf({**SMALL, "num_experts": np.int64(8), "rope_theta": np.float32(2)})
    assert type(swept.num_experts) is int
    assert type(swept.rope_theta) is float
    for rate in np.geomspace(1e-4, 1e-2, 2):
        run = RunConfig.from_dict(run_dict(optimizer__learning_rate=rate))
        assert run.optimizer.learning_rate == rate
    lengths = RunConfig.from_dict(run_dict(evaluation__lengths=[np.int64(64)])).to_dict()
    assert lengths["evaluation"]["lengths"] == [64]


def test_what_has_to_dict_is_taken_as_the_mapping_it_gives():
    run = RunConfig.from_dict(tiny.get_config().to_dict())
    assert RunConfig.from_dict(tiny.get_config()) == run
    assert ModelConfig.from_hf(tiny.get_config().model) == run.model
    assert ModelConfig.from_hf(Qwen3NextConfig(**RELEASED)) == ModelConfig.from_hf(RELEASED)


def test_layer_types_that_no_interval_describes_are_kept():
    pattern = ["full_attention", "linear_attention"]
    config = small_config(layer_types=pattern, full_attention_interval=None)
    assert config.mixers == tuple(pattern)
    assert config.to_hf()["layer_types"] == pattern


def test_the_dense_model_is_read():
    config = ModelConfig.from_hf(Qwen3Config().to_dict())
    assert set(config.layers) == {("full_attention", False)}
    assert (config.zero_centered_norm, config.attention_output_gate) == (False, False)
    assert config.rotary_dim == config.head_dim == 128
    given = {**Qwen3Config().to_dict(), "layer_types": ["full_attention", "sliding_attention"]}
    with pytest.raises(ValueError, match="layer_types holds 'sliding_attention', which is not"):
        ModelConfig.from_hf(given)
    with pytest.raises(ValueError, match="layer_types=1 must be a list of the layers' mixers"):
        ModelConfig.from_hf({**given, "layer_types": 1})


@pytest.mark.parametrize("source", ["dict", "file", "directory"])
def test_it_is_read_from_a_dict_a_file_or_a_directory(source, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(RELEASED))
    given = {"dict": RELEASED, "file": path, "directory": str(tmp_path)}[source]
    assert ModelConfig.from_hf(given).vocab_size == 151936


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        ModelConfig.from_hf(tmp_path)


@pytest.mark.parametrize(("text", "message"), [("{not", "is no JSON"), ("[1]", "holds a list")])
def test_a_file_that_is_no_config_is_named(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.json {message}"):
        ModelConfig.from_hf(tmp_path)


@pytest.mark.parametrize("section", ["model", "data", "evaluation"])
def test_sections_that_are_no_mappings_are_named(section):
    with pytest.raises(ValueError, match=f"sections {section} must be mappings"):
        RunConfig.from_dict({**run_dict(), section: None})


def test_what_the_model_has_no_use_for_is_kept_and_written_back():
    written = ModelConfig.from_hf(RELEASED).to_hf()
    for key, value in RELEASED.items():
        if value is not None:
            assert written[key] == value, key
    assert written["eos_token_id"] == 151645


@pytest.mark.parametrize(
    "given",
    [
        RELEASED,
        {**RELEASED, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {**SMALL, "layer_types": ["full_attention", "linear_attention"]},
        {**SMALL, "mlp_only_layers": [1], "intermediate_size": 8, "tie_word_embeddings": True},
        json.loads(json.dumps(Qwen3Config().to_dict())),
    ],
)
def test_writing_and_reading_changes_nothing(given):
    config = ModelConfig.from_hf(given)
    again = ModelConfig.from_hf(json.loads(json.dumps(config.to_hf())))
    assert again == config
    assert again.to_hf() == config.to_hf()


def test_transformers_builds_the_same_model_from_what_we_write():
    config = small_config(num_hidden_layers=4, partial_rotary_factor=0.5, rope_theta=77.0)
    theirs = Qwen3NextConfig(**config.to_hf())
    assert tuple(theirs.layer_types) == config.mixers
    for name in ("hidden_size", "num_experts", "head_dim", "linear_num_value_heads", "vocab_size"):
        assert getattr(theirs, name) == getattr(config, name)
    assert theirs.rope_parameters["rope_theta"] == 77.0
    assert theirs.rope_parameters["partial_rotary_factor"] == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2_moe"}, "'qwen2_moe' is not supported; expected 'qwen3_next' or"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantized \(fp8\), .*in bfloat16"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}},
            "rope_scaling.truncate is not supported",
        ),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; expected 'silu'"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1 is not supported; expected 0.0"),
        ({"hidden_size": None}, "lacks hidden_size; sizes have no defaults"),
        # transformers would take 256 in its place.
        ({"head_dim": None}, "lacks head_dim; sizes have no defaults"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not divisible by .*=3; choose"),
        ({"linear_num_key_heads": 3}, "linear_num_value_heads=4 is not divisible by"),
        ({"num_experts_per_tok": 8}, "num_experts_per_tok=8 must lie between 1 and num_experts=7"),
        ({"partial_rotary_factor": 0.2}, "rotates 3 entries; expected an even number"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2}}, "give rope_type 'yarn'"),
        ({"layer_types": ["full_attention"]}, "must name 2 layers"),
        ({"layer_types": ["linear_attention", "full_attention"] * 2}, "must name 2 layers"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "must name 2 layers"),
        ({"layer_types": 1}, "layer_types=1 must be a list of the layers' mixers"),
        ({"layer_types": False}, "layer_types=False must be a list of the layers' mixers"),
        ({"mlp_only_layers": [0]}, "intermediate_size"),
        ({"mlp_only_layers": 3}, "mlp_only_layers=3 must be a list of layers' numbers"),
        ({"mlp_only_layers": [True]}, r"mlp_only_layers=\[True\] must be a list"),
        ({"extra": 3}, "extra=3 must be a mapping"),
        ({"num_experts": -1}, "num_experts=-1 must be a number of at least 0"),
        (
            {"rope_theta": 1.0, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "rope_theta=1.0 must be above 1 with YaRN",
        ),
        ({"hidden_size": 0}, "hidden_size=0 must be at least 1"),
        (
            {"hidden_size": 0, "head_dim": 0},
            "hidden_size=0 must be at least 1\n  head_dim=0 must be at least 1",
        ),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 must be at most 10000"),
        ({"num_experts": 2**31}, "num_experts=2147483648 must be at most 2147483647"),
        ({"mtp_steps": -1}, "mtp_steps=-1 must be at least 0"),
        ({"router_init": "zeros"}, "router_init='zeros' is unknown; expected 'normalized' or"),
        ({"linear_key_head_dim": 0}, "linear_key_head_dim must be at least 1"),
        ({"hidden_size": 128.0}, "hidden_size=128.0 must be of type int"),
        ({"norm_topk_prob": "false"}, "norm_topk_prob='false' must be of type bool"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6' must be of type float"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan must be a positive number"),
        ({"router_aux_loss_coef": -1.0}, "router_aux_loss_coef=-1.0 must be a number of at least"),
        (
            {"mlp_only_layers": [-1], "intermediate_size": 8},
            r"mlp_only_layers has \[-1\]; expected layers from 0 to 1",
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 2.0,
                    "original_max_position_embeddings": "128",
                }
            },
            "original_max_position_embeddings='128' must be a whole number",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": -32}},
            "rope_scaling.beta_fast=-32 must be a positive number",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fats": 32}},
            "rope_scaling.beta_fats is not supported; expected one of rope_type, .*beta_fast",
        ),
        (  # no layer of the decoder has experts, that of the MTP module has
            {
                "mlp_only_layers": [0, 1],
                "intermediate_size": 8,
                "mtp_steps": 1,
                "num_experts_per_tok": 0,
            },
            "num_experts_per_tok=0 must lie between 1 and",
        ),
    ],
)
def test_impossible_models_are_refused_with_the_value_and_what_would_do(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf({**SMALL, **changes})


def test_all_the_problems_of_a_model_are_named_at_once():
    with pytest.raises(ValueError, match="cannot be built") as error:
        ModelConfig.from_hf({**SMALL, "num_key_value_heads": 3, "num_experts_per_tok": 9})
    assert "num_key_value_heads=3" in str(error.value)
    assert "num_experts_per_tok=9" in str(error.value)


def test_a_run_s_config_survives_json():
    config = RunConfig.from_dict(run_dict())
    again = RunConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    config.check_resumable_from(json.loads(json.dumps(config.to_dict())))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train__num_step": 3}, r"Unknown keys in train: 'num_step' \(did you mean 'num_steps'"),
        ({"model__num_expert": 3}, r"Unknown keys in model: 'num_expert' \(did you mean 'num_exp"),
        ({"model__hidden_sise": 3}, "'hidden_sise'.*'hidden_size'"),
        ({"train__balance_scope": "batch"}, "train.balance_scope='batch' is unknown; expected"),
        ({"train__num_steps": 0}, "train.num_steps=0 must be at least 1"),
        ({"train__num_steps": "many"}, "train.num_steps='many' must be of type int"),
        ({"train__num_steps": True}, "train.num_steps=True must be of type int"),
        ({"model__mtp_steps": 512}, "mtp_steps=512 must be below train.sequence_length="),
        ({"train__sequence_length": 4097}, "sequence_length=4097 exceeds the model's context of 4"),
        ({"train__gradient_accumulation_steps": 3}, "global_batch_size=8 is not divisible by"),
        (
            {"train__sequence_length": 9000},
            r"exceeds the model's context of 4096 .*rope_scaling='{\"rope_type\": \"yarn\", ",
        ),
        ({"optimizer__final_fraction": 1.5}, "final_fraction=1.5 must lie between 0 and 1"),
        ({"train__profile_steps": (3,)}, r"profile_steps=\(3,\) must be \(\) or \(first, last\)"),
        ({"train__profile_steps": (5, 3)}, r"profile_steps=\(5, 3\) must be .* first <= last"),
        ({"train__profile_steps": (0, 3)}, r"profile_steps=\(0, 3\) must be .*1 <= first"),
        ({"train__global_batch_size": -7}, "global_batch_size=-7 must be at least 1"),
        ({"data__window_rows": 2**31}, r"data.window_rows=2147483648 must be below 2\*\*31"),
        ({"optimizer__warmup_steps": 2**31}, r"warmup_steps=2147483648 must be below 2\*\*31"),
        ({"optimizer__clip_norm": 1e-46}, "clip_norm=1e-46 is 0 in float32, and every update"),
        ({"optimizer__eps": 0.0}, "optimizer.eps=0.0 must be above 0"),
        ({"optimizer__eps": 1e-300}, "optimizer.eps=1e-300 must be above 0, from 1.2e-38 up in"),
        ({"optimizer__learning_rate": 1e300}, r"learning_rate=1e\+300 must be finite in float32"),
        ({"model__rms_norm_eps": 1e-300}, "rms_norm_eps=1e-300 must be a positive number"),
        ({"model__partial_rotary_factor": float("inf")}, "factor=inf must be above 0 and at most"),
        ({"model__partial_rotary_factor": float("nan")}, "factor=nan must be above 0 and at most"),
        ({"model__partial_rotary_factor": 1e-9}, "rotates 0 entries; expected an even number"),
        ({"train__global_batch_size": 10**13 + 1}, "is not divisible by data.num_shards"),
        ({"optimizer__learning_rate": float("inf")}, "optimizer.learning_rate=inf must be finite"),
        ({"evaluation__lengths": (-5,)}, r"evaluation.lengths=\(-5,\) must be at least 1"),
        ({"optimizer__b2": 1.0}, "optimizer.b2=1.0 must lie between 0 and 1, below 1"),
        ({"data__source": "text"}, "data.source='text' needs a path, such as"),
        ({"train__new_parameters": ("mtp/*",)}, r"'mtp/\*',\) needs train.initial_checkpoint"),
        ({"precision__frozen": "bfloat16"}, "frozen='bfloat16' needs train.frozen_parameters"),
        (
            {"precision__frozen": "bfloat16", "train__frozen_parameters": ("mtp/*",)},
            "precision.compute='float32' contradicts frozen='bfloat16'",
        ),
        (
            {"precision__frozen": "float16", "train__frozen_parameters": ("mtp/*",)},
            "precision.frozen='float16' is unknown; expected '' or 'float32' or 'bfloat16'",
        ),
        ({"data__source": "web"}, "data.source='web' is unknown; expected 'stdlib' or"),
        ({"data__source": "mixture"}, "with 0 parts in data.mixture"),
        (
            {
                "data__source": "mixture",
                "data__mixture": {
                    "a": {"source": "stdlib"},
                    "b": 0.5,
                    "c": {"weight": "0.3", "source": "jsonl", "path": ("/x", "/y")},
                },
            },
            r"(?s)mixture\.a\.weight=None must be given.*mixture\.b=0\.5 must be a mapping.*"
            r"mixture\.c\.weight='0\.3' must be .*a number.*"
            r"mixture\.c\.path=\('/x', '/y'\) must be of type str",
        ),
        ({"train__sample_prompts": ("a", 1)}, r"\('a', 1\) must hold values of type str"),
        ({"train__profile_steps": (3, 4.5)}, r"\(3, 4\.5\) must hold values of type int"),
        ({"data__num_shards": 3}, "global_batch_size=8 is not divisible by data.num_shards=3"),
        ({"data__packing": "tight"}, "data.packing='tight' is unknown"),
        ({"data__path": "/x"}, "data.path='/x' is not used by source='stdlib'"),
        ({"precision__parameters": "bfloat16"}, "contradicts parameters='bfloat16'"),
        # Its config.json could not tell the run's experts from a dense model.
        ({"model__model_type": "qwen3"}, "=.* is not supported where model_type='qwen3', a dense"),
        (
            {"mesh__moe_buffer_factor": float("nan")},
            "moe_buffer_factor=nan must be a number",
        ),
        (
            {"mesh__moe_buffer_factor": float("inf")},
            "moe_buffer_factor=inf must be a number",
        ),
        ({"evaluation__seed": -1}, "evaluation.seed=-1 must be at least 0"),
        ({"train__seed": 2**32}, r"train.seed=4294967296 must be below 2\*\*32"),
        ({"mesh__fsdp": -1}, "mesh.data and mesh.fsdp are all -1"),
        (
            {"train__sample_tokens": 10**6},
            "train.sample_tokens=1000000 exceeds the model's context",
        ),
        ({"evaluation__length": 10**6}, "evaluation.length=1000000 exceeds the model's context of"),
        (
            {
                "evaluation__lengths": (4096, 8193),
                "model__rope_scaling": {"rope_type": "yarn", "factor": 2.0},
            },
            "evaluation.lengths has 8193, which exceeds the model's context of 8192 tokens",
        ),
    ],
)
def test_a_run_that_cannot_start_says_why(change, message):
    with pytest.raises(ValueError, match=message):
        RunConfig.from_dict(run_dict(**change))


@pytest.mark.parametrize(
    ("key", "below"),
    [
        *((f"train__{key}", 0) for key in ("loss_chunk", "log_every", "keep_checkpoints")),
        *((f"train__{key}", -1) for key in ("eval_every", "checkpoint_every", "sample_every")),
        *((f"train__{key}", -0.5) for key in ("mtp_loss_weight", "router_z_loss_weight")),
        *((f"optimizer__{key}", -0.5) for key in ("learning_rate", "weight_decay", "clip_norm")),
        *((f"data__{key}", 0) for key in ("num_shards", "window_rows")),
        *((f"evaluation__{key}", 0) for key in ("depths", "drafts")),
        *((f"evaluation__{key}", -1) for key in ("every", "batch_size", "limit", "length")),
        ("train__sequence_length", 1),
        ("train__gradient_accumulation_steps", 0),
        ("optimizer__warmup_steps", -1),
        ("evaluation__num_fewshot", -2),
    ],
)
def test_values_below_the_least_that_makes_sense_are_refused(key, below):
    with pytest.raises(ValueError, match=rf"{key.replace('__', '.')}={below} must be at least"):
        RunConfig.from_dict(run_dict(**{key: below}))


def test_rows_and_texts_may_be_as_long_as_the_context():
    asked = dict(train__sequence_length=4096, evaluation__length=4096)
    assert RunConfig.from_dict(run_dict(**asked)).model.context_length == 4096


def test_missing_sections_and_keys_are_named():
    given = run_dict()
    del given["mesh"], given["data"]
    with pytest.raises(ValueError, match="lacks the sections data, mesh"):
        RunConfig.from_dict(given)
    given = run_dict()
    del given["train"]["seed"]
    with pytest.raises(ValueError, match=r"lacks train\.seed"):
        RunConfig.from_dict(given)
    with pytest.raises(ValueError, match=r"Unknown keys in config: 'trian' \(did you mean 'train'"):
        RunConfig.from_dict({**run_dict(), "trian": {}})


def test_several_problems_of_a_run_are_named_at_once():
    with pytest.raises(ValueError, match="cannot start") as error:
        RunConfig.from_dict(run_dict(train__num_steps=0, train__remat="all", mesh__data=0))
    for part in ("train.num_steps=0", "train.remat='all'", "mesh.data=0"):
        assert part in str(error.value)
    given = run_dict(train__num_stepz=3, optimizer__lr=1.0, data__num_shards="x")
    del given["train"]["seed"], given["mesh"]
    given["model"]["num_key_value_heads"] = 3
    with pytest.raises(ValueError, match="cannot start") as error:
        RunConfig.from_dict(given)
    for part in (
        "'num_stepz' (did",
        "'lr'",
        "data.num_shards='x' must be",
        "lacks train.seed",
        "num_key_value_heads=3",
        "lacks the sections mesh",
    ):
        assert part in str(error.value), str(error.value)


def test_a_run_goes_on_only_where_nothing_changed_but_what_may():
    before = RunConfig.from_dict(run_dict()).to_dict()
    longer = RunConfig.from_dict(run_dict(train__num_steps=900, train__log_every=7, mesh__fsdp=2))
    longer.check_resumable_from(before)
    other = RunConfig.from_dict(
        run_dict(train__seed=1, model__num_experts=32, optimizer__weight_decay=0.2)
    )
    with pytest.raises(ValueError, match="another config") as error:
        other.check_resumable_from(before)
    for line in (
        "train.seed: was 0, now 1",
        "model.num_experts: was 16, now 32",
        "optimizer.weight_decay: was 0.1, now 0.2",
    ):
        assert line in str(error.value)
    assert "num_steps" not in str(error.value)


def test_a_run_of_before_there_were_new_and_frozen_parameters_goes_on_without_any():
    before = RunConfig.from_dict(run_dict(train__initial_checkpoint="given")).to_dict()
    for section, key in (
        ("train", "new_parameters"),
        ("train", "frozen_parameters"),
        ("precision", "frozen"),
    ):
        del before[section][key]
    RunConfig.from_dict(run_dict(train__initial_checkpoint="given")).check_resumable_from(before)
    for key in ("new_parameters", "frozen_parameters"):
        changes = {"train__initial_checkpoint": "given", f"train__{key}": ("mtp/*",)}
        with pytest.raises(ValueError, match=rf"{key}: was \[\], now \['mtp/\*'\]"):
            RunConfig.from_dict(run_dict(**changes)).check_resumable_from(before)
    frozen = dict(train__frozen_parameters=("mtp/*",), precision__compute="bfloat16")
    other = RunConfig.from_dict(run_dict(**frozen, precision__frozen="bfloat16"))
    with pytest.raises(ValueError, match="frozen: was '', now 'bfloat16'"):
        other.check_resumable_from(before)


def test_a_run_that_met_a_bad_record_may_go_on_without_it():
    strict = run_dict(data__packing="best_fit")
    before = RunConfig.from_dict(strict).to_dict()
    lenient = dict(data__on_error="skip", data__too_long="truncate")
    after = RunConfig.from_dict(run_dict(data__packing="best_fit", **lenient))
    after.check_resumable_from(before)
    with pytest.raises(ValueError, match="on_error: was 'skip', now 'raise'") as error:
        RunConfig.from_dict(strict).check_resumable_from(after.to_dict())
    assert "too_long: was 'truncate', now 'error'" in str(error.value)
    # Where records were left out, those that are cut now may be among them.
    skipping = run_dict(data__packing="best_fit", data__on_error="skip")
    with pytest.raises(ValueError, match="too_long: was 'error', now 'truncate'"):
        after.check_resumable_from(RunConfig.from_dict(skipping).to_dict())
    # Nor may those that were cut be refused from now on.
    cutting = run_dict(data__packing="best_fit", data__too_long="truncate")
    with pytest.raises(ValueError, match="too_long: was 'truncate', now 'error'"):
        RunConfig.from_dict(strict).check_resumable_from(RunConfig.from_dict(cutting).to_dict())


def test_what_may_change_are_keys_that_exist():
    flat = {
        f"{section}.{key}"
        for section, keys in RunConfig.from_dict(run_dict()).to_dict().items()
        for key in keys
    }
    assert set(RunConfig.MUTABLE) <= flat
    # All else decides what is learnt: only how long, how split up, and what is told may change.
    decides = {
        key for key in flat if key.startswith(("model.", "data.", "optimizer.", "precision."))
    }
    assert not decides & set(RunConfig.MUTABLE)
    assert {key for key in flat - decides if key not in RunConfig.MUTABLE} == {
        f"train.{key}"
        for key in (
            "initial_checkpoint",
            "new_parameters",
            "frozen_parameters",
            "global_batch_size",
            "sequence_length",
            "seed",
            "balance_scope",
            "gradient_accumulation_steps",
            "mtp_loss_weight",
            "router_z_loss_weight",
        )
    }


def test_a_work_directorys_config_is_known_for_one():
    with pytest.raises(ValueError, match=r"model_type=None .* is a work directory of ours, which"):
        ModelConfig.from_hf(RunConfig.from_dict(run_dict()).to_dict())


def test_configs_cannot_be_changed_nor_shared_by_accident():
    given = copy.deepcopy(RELEASED)
    config = ModelConfig.from_hf(given)
    assert given == RELEASED
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 1
