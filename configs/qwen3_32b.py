"""Dense Qwen3-32B: the yardstick that Qwen3-Next is measured against, by the same code.

    python train.py --config=configs/qwen3_32b.py --workdir=DIR \
        --config.data.path='/corpus/**/*.txt' --config.data.tokenizer=FILE

Every layer is full attention without an output gate, the feed-forward is dense, norms multiply by
w. Training state is 0.33 TB. Per token it costs 8.9 times the forward operations of
Qwen3-Next-80B-A3B at 4,096 tokens of context.
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
    config = tiny.get_config()
    config.model = ConfigDict(
        dict(
            model_type="qwen3",
            vocab_size=151936,
            hidden_size=5120,
            num_hidden_layers=64,
            max_position_embeddings=40960,
            num_attention_heads=64,
            num_key_value_heads=8,
            head_dim=128,
            rope_theta=1e6,
            intermediate_size=25600,
            rms_norm_eps=1e-6,
            initializer_range=0.02,
            tie_word_embeddings=False,
            mtp_steps=0,
        )
    )
    config.data.update(
        source="text",
        path="/corpus/**/*.txt",
        holdout_fraction=0.001,
        num_shards=256,
    )
    config.optimizer.update(learning_rate=3e-4, schedule="wsd", warmup_steps=2000)
    config.train.update(
        num_steps=250_000,
        global_batch_size=1024,
        sequence_length=4096,
        loss_chunk=256,
        remat="layer",
        eval_every=1000,
        checkpoint_every=500,
        sample_tokens=0,
    )
    config.precision.update(compute="bfloat16", optimizer="bfloat16")
    config.mesh.update(data=1, fsdp=-1)
    return config
