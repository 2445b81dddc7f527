"""The flags that no run can have: what Megatron drops, modes of other programs, the untried."""

from __future__ import annotations

from megatron_prores.command_line.rules import Rule, is_true

# Flags of upstream that its 0.19.2 drops on the way to what they should change: a run would train
# another model than its command line says.
_DROPPED_BY_MEGATRON: tuple[Rule, ...] = (
    (
        "--rope-scaling-factor",
        lambda a: a.rope_scaling_factor != 8.0,
        "Megatron 0.19 does not hand it to the model, whose factor stays 8",
    ),
    (
        "--heterogeneous-layers-config-encoded-json",
        is_true("heterogeneous_layers_config_encoded_json"),
        "Megatron builds such layers only with --heterogeneous-layers-config-path; give the file",
    ),
    (
        "--position-embedding-type relative",
        lambda a: a.position_embedding_type == "relative",
        "Megatron's GPT model has no relative positions and would train without any",
    ),
    (
        "--num-query-groups",
        lambda a: (
            a.num_query_groups not in (None, 1)
            and not (a.group_query_attention or a.use_checkpoint_args)
        ),
        "Megatron ignores it without --group-query-attention; give both",
    ),
    (
        "--logits-load-dir",
        is_true("logits_load_dir"),
        "the distillation loss is not part of this program",
    ),
)

# Spellings that upstream's validation still takes, or ends with an assertion or exit code 0.
_NO_MORE: tuple[Rule, ...] = (
    (
        "--checkpoint-activations",
        is_true("checkpoint_activations"),
        "it is no more; use --recompute-activations",
    ),
    ("--batch-size", is_true("batch_size"), "it is no more; use --micro-batch-size"),
    ("--warmup", is_true("warmup"), "it is no more; use --lr-warmup-fraction"),
    (
        "--model-parallel-size",
        is_true("model_parallel_size"),
        "it is no more; use --tensor-model-parallel-size",
    ),
    # These three choose a graph after this program's checks of graphs.
    ("--enable-cuda-graph", is_true("enable_cuda_graph"), "use --cuda-graph-impl local"),
    (
        "--external-cuda-graph",
        is_true("external_cuda_graph"),
        "use --cuda-graph-impl transformer_engine",
    ),
    (
        "--cuda-graph-scope",
        is_true("cuda_graph_scope_deprecated"),
        "use --cuda-graph-modules, or --cuda-graph-impl full_iteration",
    ),
    (
        "--cuda-graph-modules full_iteration",
        lambda a: "full_iteration" in a.cuda_graph_modules,
        "use --cuda-graph-impl full_iteration",
    ),
    (
        "--init-method-xavier-uniform",
        is_true("init_method_xavier_uniform"),
        "Megatron 0.19 cannot build a model with it",
    ),
    (
        "--config-logger-dir",
        is_true("config_logger_dir"),
        "Megatron 0.19 cannot write down the process groups of what it logs there",
    ),
    (
        "--full-validation",
        lambda a: a.full_validation and not a.multiple_validation_sets,
        "Megatron 0.19 ends at the first evaluation without --multiple-validation-sets; give both",
    ),
    (
        "--multiple-validation-sets",
        lambda a: a.multiple_validation_sets and not a.full_validation,
        "Megatron 0.19 ends at the first evaluation without --full-validation; give both",
    ),
    (
        "--decoder-num-layers",
        is_true("decoder_num_layers"),
        "a GPT model has no encoder and decoder; use --num-layers",
    ),
    (
        "--decoder-seq-length",
        is_true("decoder_seq_length"),
        "a GPT model has no encoder and decoder; use --seq-length",
    ),
    (
        "--attention-backend local",
        lambda a: a.attention_backend.name == "local" and a.spec is None,
        "upstream's check of it needs --spec; use --attention-backend unfused",
    ),
)

FAILS_IN_MEGATRON: tuple[Rule, ...] = (
    (
        "--use-distributed-optimizer with --optimizer sgd",
        lambda a: a.use_distributed_optimizer and a.optimizer == "sgd" and not a.skip_train,
        "Megatron does not shard the state of sgd; leave it out, or use --optimizer adam",
    ),
    (
        "--recompute-modules mlp",
        lambda a: (
            (a.recompute_granularity == "selective" or a.recompute_activations)
            and "mlp" in (a.recompute_modules or ())
            and a.add_bias_linear
        ),
        "Megatron's backward pass never ends when it recomputes an MLP with biases; give "
        "--disable-bias-linear, or --recompute-granularity full",
    ),
    (
        "--tensor-model-parallel-size with --num-experts",
        lambda a: (
            bool(a.num_experts)
            and a.tensor_model_parallel_size > 1
            and not (a.sequence_parallel or a.skip_train)
        ),
        "Megatron ends the first training step of experts under tensor parallelism without "
        "--sequence-parallel; give it",
    ),
    (
        "--save with --mtp-num-layers, tied embeddings and --pipeline-model-parallel-size",
        lambda a: (
            bool(a.save and a.mtp_num_layers)
            and not a.untie_embeddings_and_output_weights
            and a.pipeline_model_parallel_size > 1
            and "m" in (a.pipeline_model_parallel_layout or "m").split("|")[-1]
        ),
        "Megatron cannot save a last stage that has prediction layers and a tied output head; give "
        "--untie-embeddings-and-output-weights, or --pipeline-model-parallel-layout with the "
        "prediction layers on a stage before the last",
    ),
    (
        "--cross-entropy-loss-fusion without --bf16",
        lambda a: a.cross_entropy_loss_fusion and not a.bf16,
        "Megatron rounds the gradient of the logits to bfloat16 there, whatever the weights are",
    ),
    (
        "--num-experts with biases",
        lambda a: (
            bool(a.num_experts) and a.add_bias_linear and not (a.moe_grouped_gemm or a.skip_train)
        ),
        "Megatron ends the first training step of such experts; give --disable-bias-linear",
    ),
)
"""Combinations that Megatron 0.19 hangs at, ends with a traceback, cannot save, or computes less
precisely than they say."""

_OTHER_TOKENIZERS = ("MultimodalTokenizer", "NullMultimodalTokenizer", "SFTTokenizer")

# This main program pretrains GPT models on packed text; upstream's has more modes.
_OTHER_PROGRAMS: tuple[Rule, ...] = (
    ("--sft", is_true("sft"), "this program pretrains; finetuning is not part of it"),
    ("--fim-data", is_true("fim_data"), "fill-in-the-middle data is not supported yet"),
    ("--perform-rl-step", is_true("perform_rl_step"), "this program pretrains"),
    ("--vision-pretraining", is_true("vision_pretraining"), "this program trains on text"),
    (
        "--position-embedding-type mrope",
        lambda a: a.position_embedding_type == "mrope",
        "its positions are those of images and text, and this program trains on text",
    ),
    (
        "--tokenizer-type of images or conversations",
        lambda a: a.tokenizer_type in _OTHER_TOKENIZERS,
        "this program trains on text, and does not finetune",
    ),
    (
        "--logits-save-dir",
        is_true("logits_save_dir"),
        "distillation is not part of this program",
    ),
    (
        "--ckpt-convert-format",
        is_true("ckpt_convert_format"),
        "this program trains; it does not convert checkpoints",
    ),
    # Upstream's validation makes --hybrid-layer-pattern of these after our checks of it.
    (
        "--hybrid-override-pattern",
        is_true("hybrid_override_pattern"),
        "it is no more; use --hybrid-layer-pattern",
    ),
    (
        "--mtp-hybrid-override-pattern",
        is_true("mtp_hybrid_override_pattern"),
        "it is no more; write prediction layers behind a / in --hybrid-layer-pattern",
    ),
    ("--is-hybrid-model", is_true("is_hybrid_model"), "use --hybrid-layer-pattern"),
    (
        "--hybrid-context-parallel",
        is_true("hybrid_context_parallel"),
        "it needs finetuning data; use --context-parallel-size",
    ),
    (
        "--dataloader-inter-document-masking",
        is_true("dataloader_inter_document_masking"),
        "packed sequences with boundaries are not supported yet; use --reset-attention-mask with "
        "--transformer-impl local",
    ),
    (
        "--dataloader-type external",
        lambda a: a.dataloader_type == "external",
        "this program makes the data loaders",
    ),
    (
        "--object-storage-cache-path",
        is_true("object_storage_cache_path"),
        "data in object storage is not supported; give a path of this machine",
    ),
)

_SAVED_APART = (
    "its checkpoints would be loaded neither verified nor compared; a smaller --save-interval with "
    "--save-retain-interval keeps as few"
)

# What would meet this program's hooks, checks or initial weights in a way that nobody has tried.
_UNTRIED: tuple[Rule, ...] = (
    (
        "--inprocess-restart",
        is_true("inprocess_restart"),
        "a second start in one process would meet the signal handlers, the lock on --save and the "
        "hooks of the first; let the launcher start the run again",
    ),
    (
        "--adlr-autoresume",
        is_true("adlr_autoresume"),
        "its library, userlib, is not public, and nobody has tried it; see docs/slurm.md",
    ),
    (
        "--moe-use-upcycling",
        is_true("moe_use_upcycling"),
        "it builds a second, dense model, which the layers' hooks do not know",
    ),
    (
        "--tensor-parallel-num-weight-shards",
        lambda a: a.tensor_parallel_num_weight_shards is not None,
        "neither the initial weights nor the planner knows weights that are cut once more",
    ),
    (
        "--expert-tensor-parallel-num-weight-shards",
        lambda a: a.expert_tensor_parallel_num_weight_shards is not None,
        "neither the initial weights nor the planner knows weights that are cut once more",
    ),
    (
        "--non-persistent-ckpt-type",
        is_true("non_persistent_ckpt_type"),
        _SAVED_APART,
    ),
    (
        "--non-persistent-save-interval",
        is_true("non_persistent_save_interval"),
        _SAVED_APART,
    ),
    (
        "--ckpt-format with --save or --load",
        lambda a: (
            a.ckpt_format != "torch_dist" and bool(a.save or a.load or a.pretrained_checkpoint)
        ),
        "only checkpoints in torch_dist have a manifest, and remember the ProRes settings so that "
        "a run which does not continue them is stopped",
    ),
    (
        "--phase-transition-iterations",
        is_true("phase_transition_iterations"),
        "the data of each phase starts anew, which resuming and planning do not know",
    ),
    (
        "--freeze-all-layers",
        is_true("freeze_all_layers"),
        "nothing would be trained; to evaluate, use --skip-train",
    ),
    (
        "--no-initialization",
        lambda a: not a.perform_initialization and not (a.load or a.pretrained_checkpoint),
        "training would start from whatever the memory holds; it is for runs with --load",
    ),
    (
        "--use-mup",
        lambda a: a.use_mup and a.embedding_init_method_std is None,
        "the embedding's standard deviation grows with the width here, which muP must not have; "
        "give --embedding-init-method-std",
    ),
    (
        "--lazy-mpu-init",
        is_true("lazy_mpu_init"),
        "it leaves the process groups to another program",
    ),
    (
        "--fake-process-group",
        is_true("fake_process_group"),
        "ranks that do not talk cannot agree on who holds which layer",
    ),
    (
        "--use-ring-exchange-p2p",
        is_true("use_ring_exchange_p2p"),
        "it needs a torch that is built with torch.distributed.ring_exchange",
    ),
)

NEVER = (
    *_DROPPED_BY_MEGATRON,
    *_NO_MORE,
    *_OTHER_PROGRAMS,
    *_UNTRIED,
)
"""Refused in every run."""
