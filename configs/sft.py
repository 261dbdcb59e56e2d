"""Fine-tunes on chats, from a directory's weights, tokenizer and chat template.

    python train.py --config=configs/sft.py:DIR --workdir=RUN --config.data.path='chats/*.jsonl'
    python -m qwen3next_jax.convert to-hf RUN EXPORTED

DIR is a Hugging Face model (or a checkpoint of ours); its config is the run's. A line of the files
is `{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}], "tools": [...]}`.
Only the assistant's turns are in the loss. Chats stay whole: one that is longer than a row is an
error, or with `data.too_long="truncate"` loses its end. `docs/finetuning.md` says more.
"""

import dataclasses

from ml_collections import ConfigDict, config_dict

from configs import tiny
from qwen3next_jax.command import friendly_errors


def get_config(directory: str = "") -> ConfigDict:
    # Exits with the message alone; the flag of the config would bury an exception in a traceback.
    with friendly_errors():
        if not directory:
            raise FileNotFoundError("Which model? Give its directory: --config=configs/sft.py:DIR")
        from qwen3next_jax.checkpoint.load import checkpoint_config

        model = checkpoint_config(directory)
    config = tiny.get_config()
    config.model = ConfigDict(dataclasses.asdict(model))
    if model.layer_types is None:
        config.model.layer_types = config_dict.placeholder(tuple)
    if model.rope_scaling is None:
        config.model.rope_scaling = ConfigDict()
    config.data.update(
        source="jsonl",
        field="messages",
        tokenizer=directory,
        packing="best_fit",
        holdout_fraction=0.02,
    )
    config.optimizer.update(
        learning_rate=1e-5,
        warmup_steps=50,
        final_fraction=0.1,
        weight_decay=0.0,
    )
    config.train.update(
        initial_checkpoint=directory,
        num_steps=1000,
        global_batch_size=32,
        sequence_length=min(4096, model.context_length),
        loss_chunk=256,
        remat="layer",
        eval_every=100,
        sample_tokens=0,
    )
    config.precision.update(compute="bfloat16")
    config.mesh.update(data=1, fsdp=-1)
    return config
