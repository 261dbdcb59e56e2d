"""A tiny Qwen3-Next that learns to write Python on a laptop.

    python train.py

trains it on the source of Python's own standard library, which every machine with Python has. On
two CPU cores the run takes about six minutes and reaches 1.62 bits per byte on held-out files,
where gzip -9 needs 1.95.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()

    # The model: the names are those of a released config.json, the last four are ours.
    config.model = ConfigDict(
        dict(
            model_type="qwen3_next",  # "qwen3" is dense: see qwen3_32b.py
            vocab_size=2048,
            hidden_size=128,
            num_hidden_layers=4,
            full_attention_interval=4,  # three Gated DeltaNet layers, then one of full attention
            layer_types=config_dict.placeholder(tuple),  # or each layer's kind, one by one
            max_position_embeddings=4096,
            # Gated attention.
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            rope_theta=10_000.0,
            partial_rotary_factor=0.25,  # the share of a head that is rotated
            rope_scaling=ConfigDict(),  # YaRN, for contexts beyond training; empty: none
            # Gated DeltaNet.
            linear_conv_kernel_dim=4,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=32,
            linear_value_head_dim=32,
            # Experts: each token uses the best few, and the shared one.
            num_experts=16,
            num_experts_per_tok=4,
            moe_intermediate_size=64,
            shared_expert_intermediate_size=64,
            norm_topk_prob=True,  # the weights of the chosen experts sum to 1
            router_aux_loss_coef=1e-3,  # weight of the balance loss
            intermediate_size=0,  # of layers without experts; there are none here
            mlp_only_layers=(),  # layers without experts, by index
            decoder_sparse_step=1,  # every how many layers there are experts
            rms_norm_eps=1e-6,
            initializer_range=0.02,  # standard deviation of the initial weights
            tie_word_embeddings=False,
            mtp_steps=1,  # tokens beyond the next that are predicted as well; 0: no MTP
            zero_centered_norm=True,  # norms multiply by 1 + w; False: by w
            attention_output_gate=True,  # False: attention without its output gate
            router_init="normalized",  # each expert's router weights of one norm; or "normal"
        )
    )

    config.data = ConfigDict(
        dict(
            source="stdlib",  # Python's standard library; docs/data.md lists the others
            path="",  # for the other sources a glob, such as "/corpus/**/*.txt"
            field="text",  # the field of JSON objects and table rows that holds the text
            split="train",  # of TensorFlow Datasets
            mixture=ConfigDict(),  # of source="mixture": {name: {weight=..., source=..., ...}}
            tokenizer="",  # SentencePiece, tokenizer.json or "bytes"; "": train one and keep it
            chat_template="",  # a Jinja file; "": the one beside the tokenizer
            holdout_fraction=0.05,  # share of the records kept for evaluation
            on_error="raise",  # at a bad record; or "skip" it and count it
            packing="concatenate",  # and split; or "best_fit", which keeps documents whole
            too_long="error",  # for "best_fit", on documents longer than a row; or "truncate"
            num_shards=4,  # divides global_batch_size; any divisor of it may be the number of hosts
            window_rows=128,  # rows of a shard that are packed and shuffled together
        )
    )

    config.optimizer = ConfigDict(
        dict(
            name="adamw",  # or "muon"
            learning_rate=4e-3,  # the peak
            schedule="cosine",  # or "wsd" (hold, then decay) or "constant"
            warmup_steps=20,
            decay_fraction=0.2,  # "wsd": the last share of the steps, in which the rate falls
            final_fraction=0.05,  # the last rate, as a share of the peak
            weight_decay=0.1,
            b1=0.9,
            b2=0.95,
            eps=1e-8,
            clip_norm=1.0,  # of the global gradient norm; 0: no clipping
        )
    )

    config.train = ConfigDict(
        dict(
            num_steps=300,
            initial_checkpoint="",  # weights to begin with: a directory of any kind; "": random
            new_parameters=(),  # of these, by globs such as "mtp/*", those that are random
            frozen_parameters=(),  # those that no step changes, by such globs
            global_batch_size=8,  # rows a step
            sequence_length=512,  # tokens a row
            gradient_accumulation_steps=1,  # micro-batches a step
            seed=0,
            mtp_loss_weight=0.1,
            router_z_loss_weight=0.0,
            balance_scope="global",  # or "micro_batch" or "sequence"
            loss_chunk=128,  # positions of a row whose logits exist at a time
            remat="none",  # or "layer": keep only each layer's input for the backward pass;
            # or "layer_but_attention": attention's results too
            log_every=10,
            diagnostics=True,  # metrics of layers and updates, docs/training.md lists them
            eval_every=0,  # 0: only at the end
            checkpoint_every=100,  # 0: only at the end
            keep_checkpoints=2,  # how many of the newest stay
            keep_best=0,  # how many with the lowest evaluation cross-entropy also stay
            sample_tokens=200,  # length of the texts written as samples; 0: none
            sample_every=100,  # 0: only at the end
            sample_prompts=("",),  # each is continued; "" is the start of a document
            profile_steps=(),  # (first, last) step of a profiler trace
        )
    )

    config.precision = ConfigDict(
        dict(
            parameters="float32",  # master copies
            frozen="",  # dtype of train.frozen_parameters; "": that of the others
            compute="float32",  # activations and matrix products
            optimizer="float32",  # first moments
            matmul="default",  # passes of float32 products on a TPU: "default", "high", "highest"
        )
    )

    # Suites to run during training; docs/evaluation.md describes them.
    config.evaluation = ConfigDict(
        dict(
            suites=(),  # "perplexity", "lm_eval", "long_context", "speculation"
            every=0,  # steps; 0: only at the end
            batch_size=0,  # rows at a time; 0: 8192 tokens a device
            limit=0,  # documents, prompts or questions of a cell; 0: all, or the suite's default
            length=0,  # perplexity: tokens of a document read at once; 0: the context
            tasks=(),  # lm_eval: names of the harness's tasks, or YAML files
            include_path="",  # lm_eval: a directory with more of them
            num_fewshot=-1,  # lm_eval: examples before a question; -1: as the task says
            confirm_run_unsafe_code=False,  # lm_eval: run what the model writes, if a task does
            long_context_tasks=(),  # (): all
            lengths=(),  # long_context, in tokens; (): powers of two up to the context
            depths=5,  # long_context
            drafts=2,  # speculation: tokens drafted at a time
            chat=False,  # lm_eval, long_context: ask through the chat template
            seed=1234,  # of the suites
        )
    )

    # Sizes of the mesh axes; -1 takes the devices that are left.
    config.mesh = ConfigDict(
        dict(
            data=-1,  # replicas of the parameters, each with its own rows of the batch
            fsdp=1,  # shards of the parameters, gathered where they are used; own rows
            expert=1,  # each device its own experts, to which tokens are sent; own rows
            context=1,  # each device its own stretch of every row's tokens
            tensor=1,  # each device its own heads and columns
            num_slices=1,  # TPU slices joined by a slower network, along data; -1: as found
            moe_buffer_factor=-1.0,  # receive buffer, in even loads; -1: for any load
            on_overflow="error",  # rows beyond the buffer end the run; "drop": are counted
            max_replicated=0.02,  # largest share of a device's state that may be replicas
        )
    )
    return config
