"""A billion parameters, a tenth of them active: the architecture at a size one can study.

    python train.py --config=configs/1b_a100m.py --workdir=DIR --config.data.path='/corpus/**/*.txt'

For one GPU of 80 GB, or 8 TPU chips or GPUs (the parameters are then sliced over all of them).
Training state is 13 GB. 20,000 steps of 262,144 tokens are 5 billion tokens and 5.7 EFLOP, 6.7 with
rematerialisation: about nine hours on a device that sustains 200 TFLOP/s. The tokenizer is trained
on the corpus.
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
    config = tiny.get_config()
    config.model.update(
        vocab_size=32768,
        hidden_size=768,
        num_hidden_layers=12,
        max_position_embeddings=32768,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        rope_theta=1e6,
        linear_num_key_heads=8,
        linear_num_value_heads=16,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=256,
        shared_expert_intermediate_size=256,
    )
    config.data.update(
        source="text",
        path="/corpus/**/*.txt",
        holdout_fraction=0.005,
        num_shards=64,
    )
    config.optimizer.update(learning_rate=1e-3, schedule="wsd", warmup_steps=500)
    config.train.update(
        num_steps=20_000,
        global_batch_size=64,
        sequence_length=4096,
        remat="layer",
        eval_every=1000,
        checkpoint_every=500,
    )
    config.precision.update(compute="bfloat16")
    config.mesh.update(data=1, fsdp=-1)
    return config
