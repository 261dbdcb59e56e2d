"""Qwen3-Next-80B-A3B on its whole context: rows of 262,144 tokens.

    python train.py --config=configs/80b_a3b_long.py --workdir=DIR \
        --config.train.initial_checkpoint=SHORT --config.data.path='/corpus/**/*.txt' \
        --config.data.tokenizer=FILE

It is laid out for 64 TPU v5p chips, 16 for each of four rows, that is 16,384 tokens a chip as in
`configs/80b_a3b.py`: 37 GB a chip by the TPU compiler (`docs/parallelism.md`, "What a layout
costs"). The stage in which a model sees long rows is short; it starts from the weights of the stage
before, SHORT: a work directory or a Hugging Face model.
"""

import importlib

from ml_collections import ConfigDict

shorter = importlib.import_module("configs.80b_a3b")  # no identifier starts with a digit


def get_config() -> ConfigDict:
    config = shorter.get_config()
    config.data.update(num_shards=4, window_rows=8)
    config.optimizer.update(learning_rate=3e-5, warmup_steps=100)
    config.train.update(
        num_steps=2000,
        global_batch_size=4,
        sequence_length=262144,
        loss_chunk=1024,
        remat="layer_but_attention",  # attention is by far the longest part of a step here
        eval_every=100,
        checkpoint_every=100,
    )
    config.mesh.update(fsdp=1, expert=4, context=16)
    return config
