"""Qwen3-Next-80B-A3B with its MTP module: 81.3 billion parameters, about 3 billion active.

    python train.py --config=configs/80b_a3b.py --workdir=DIR \
        --config.data.path='/corpus/**/*.txt' --config.data.tokenizer=FILE

It is laid out for 64 TPU v5p chips with 4 rows of 4096 tokens each (`docs/plan.md` says what they
hold); on more chips, raise `train.global_batch_size` with their number. Training state is 0.81 TB
(float32 parameters and second moments, bfloat16 first moments), which the mesh divides; gradients
are another 0.33 TB. A step of 1 million tokens is 0.027 EFLOP by the arithmetic of
`docs/architecture.md`. The makers trained on 15 trillion tokens, 14 million of these steps; the
length here is an example.
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
    config = tiny.get_config()
    config.model.update(
        vocab_size=151936,
        hidden_size=2048,
        num_hidden_layers=48,
        max_position_embeddings=262144,
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=256,
        rope_theta=1e7,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        num_experts=512,
        num_experts_per_tok=10,
        moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
        intermediate_size=5120,
    )
    config.data.update(
        source="text",
        path="/corpus/**/*.txt",
        holdout_fraction=0.001,
        num_shards=256,
    )
    config.optimizer.update(
        learning_rate=3e-4,
        schedule="wsd",
        warmup_steps=2000,
        final_fraction=0.1,
    )
    config.train.update(
        num_steps=250_000,
        global_batch_size=256,
        sequence_length=4096,
        loss_chunk=256,
        remat="layer",
        eval_every=1000,
        checkpoint_every=500,
        sample_tokens=0,
    )
    config.precision.update(compute="bfloat16", optimizer="bfloat16")
    # An untrained router sends some chips more rows than their buffers hold. These are dropped and
    # counted (`dropped_share`), because ending so long a run over them would help nobody.
    # Experts are split over all 64 chips, so that no chip gathers their matrices.
    config.mesh.update(data=1, fsdp=-1, expert=64, moe_buffer_factor=1.25, on_overflow="drop")
    return config
