"""Flags that change nothing here, and flags that nobody has tried with ProRes: said in a warning.

docs/flags.md lists every flag of Megatron's parser with its verdict; tests/unit/test_flag_list.py
keeps that list, these tables, and the parser together.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

_OTHER_PROGRAMS = {
    "it belongs to vision models": """
        num_classes img_h img_w num_channels patch_dim classes_fraction data_per_class_fraction
        head_lr_mult vision_pretraining_type vision_backbone_type swin_backbone_type mask_type
        mask_factor iter_per_epoch dino_local_img_size dino_local_crops_number dino_head_hidden_size
        dino_bottleneck_size dino_freeze_last_layer dino_norm_last_layer dino_warmup_teacher_temp
        dino_teacher_temp dino_warmup_teacher_temp_epochs mrope_section
        """,
    "it belongs to BERT, T5 or retrieval models": """
        ict_head_size biencoder_projection_dim biencoder_shared_query_context_model ict_load
        bert_load titles_data_path query_in_block_prob use_one_sent_docs evidence_data_path
        retriever_report_topk_accuracies retriever_score_scaling block_data_path embedding_path
        indexer_batch_size indexer_log_interval bert_binary_head mask_prob short_seq_prob
        sample_rate relative_attention_num_buckets relative_attention_max_distance vocab_extra_ids
        """,
    "it belongs to reinforcement learning": """
        rl_prompts_per_eval grpo_prompts_per_step grpo_group_size rl_generation_lag
        rl_submission_granularity rl_consumption_granularity grpo_iterations grpo_clamp_eps_lower
        grpo_clamp_eps_upper grpo_kl_beta grpo_entropy_term_weight
        grpo_filter_groups_with_same_reward langrl_env_config rl_default_temperature
        rl_default_top_p rl_default_top_k rl_offload_optimizer_during_inference
        rl_kv_cache_management_mode rl_persist_cuda_graphs rl_partial_rollouts
        rl_inference_logprobs_is_correction rl_importance_sampling_truncation_coef
        rl_use_sequence_packing rl_sequence_packing_max_sequences_per_bin rl_sequence_packing_algo
        rl_training_cuda_graphs rl_inference_tensor_model_parallel_size
        rl_inference_pipeline_model_parallel_size rl_inference_expert_model_parallel_size
        rl_inference_expert_tensor_model_parallel_size rl_inference_model_unified_memory_level
        rl_offload_inference_model_weights_when_idle refit_method rl_verify_model_weights_swap
        rl_skip_bos_token rl_profile rl_profile_dir rl_inference_parsers
        """,
    "it belongs to inference": """
        inference_batch_times_seqlen_threshold max_tokens_to_oom output_bert_embeddings
        bert_embedder_type use_legacy_static_engine inference_max_requests inference_max_seq_length
        inference_dynamic_batching inference_dynamic_batching_buffer_size_gb
        inference_dynamic_batching_paused_buffer_size_gb
        inference_dynamic_batching_mamba_memory_ratio inference_dynamic_batching_block_size
        inference_dynamic_batching_max_requests inference_dynamic_batching_max_tokens
        inference_dynamic_batching_num_cuda_graphs
        inference_dynamic_batching_track_paused_request_events
        inference_dynamic_batching_track_generated_token_events decode_only_cuda_graphs
        inference_cuda_graph_all_prefills inference_cuda_graph_max_tokens
        inference_dynamic_batching_unified_memory_level enable_chunked_prefill
        num_speculative_tokens inference_dynamic_batching_enable_prefix_caching
        inference_dynamic_batching_prefix_caching_eviction_policy
        inference_dynamic_batching_prefix_caching_coordinator_policy
        inference_dynamic_batching_prefix_caching_routing_alpha
        inference_dynamic_batching_prefix_caching_mamba_gb
        inference_dynamic_batching_cuda_graph_mixed_prefill_count
        inference_dynamic_batching_cuda_graph_sizing_distribution
        inference_dynamic_batching_sampling_backend offset_sampling_seed_by_dp_rank
        inference_dynamic_batching_async_sched_mode inference_dynamic_batching_logprobs_mode
        inference_logging_step_interval inference_text_gen_server_logging inference_wandb_logging
        inference_coordinator_port mamba_inference_conv_states_dtype
        mamba_inference_ssm_states_dtype inference_use_synchronous_zmq_collectives
        inference_disable_ep_consensus inference_shards flash_decode nccl_all_reduce_for_prefill
        inference_disable_triton_nvls_kernels inference_grouped_gemm_backend
        inference_moe_disable_fused_quant_kernels inference_moe_token_dispatcher_type
        inference_cuda_graph_scope mlp_chunks_for_prefill moe_pad_experts_for_cuda_graph_inference
        cache_mla_latents
        """,
    "it belongs to --fim-data, which is refused": """
        fim_rate fim_spm_rate fim_split_sample fim_fragment_rate fim_no_prefix fim_prefix_token
        fim_middle_token fim_suffix_token fim_pad_token fim_eod_token
        """,
    "it belongs to distillation": """
        logits_save_top_k logits_save_top_p logits_save_top_p_min_k logits_save_dtype
        logits_load_decode_threads logits_load_prefetch_factor logits_load_msc_prefetch_depth
        logits_load_kd_loss_alpha logits_load_ignore_errors
        """,
    "it belongs to finetuning on conversations": "sft_tokenizer_prompt_format chat_template",
    "it belongs to --inprocess-restart, which is refused": """
        inprocess_max_iterations inprocess_monitor_thread_interval
        inprocess_monitor_process_interval inprocess_progress_watchdog_interval
        inprocess_heartbeat_interval inprocess_soft_timeout inprocess_hard_timeout
        inprocess_heartbeat_timeout inprocess_barrier_timeout inprocess_completion_timeout
        inprocess_last_call_wait inprocess_termination_grace_time inprocess_granularity
        inprocess_active_world_size inprocess_empty_cuda_cache
        """,
}

NO_EFFECT = {
    **_OTHER_PROGRAMS,
    "it belongs to --adlr-autoresume, which is refused": "adlr_autoresume_interval",
    "it belongs to --ckpt-convert-format, which is refused": (
        "ckpt_convert_save ckpt_convert_update_legacy_dist_opt_format"
    ),
    "it belongs to --hybrid-context-parallel, which is refused": "max_seqlen_per_dp_cp_rank",
    "it belongs to --non-persistent-ckpt-type, which is refused": """
        non_persistent_global_ckpt_dir non_persistent_local_ckpt_dir non_persistent_local_ckpt_algo
        replication replication_jump replication_factor
        """,
    "it is found by its files anyway, and only torch_dist is taken": "auto_detect_ckpt_format",
    "it belongs to --moe-use-upcycling, which is refused": "moe_upcycling_granularity",
    "Megatron 0.19 has no code behind it": """
        onnx_safe deprecated_use_mcore_models enable_full_sharding_in_hsdp
        dist_ckpt_save_pre_mcore_014 openai_gelu
        """,
    "Megatron 0.19 trains at the full batch size from the first step; use "
    "--step-batch-size-schedule": "rampup_batch_size",
    "Megatron 0.19 has no code behind it; choose with --norm-placement": (
        "apply_residual_connection_post_layernorm"
    ),
    "Megatron 0.19 has no code behind it; choose with --attention-backend": "use_flash_attn",
    "Megatron 0.19 has no code behind it; choose with --ckpt-format": (
        "use_dist_ckpt_deprecated dist_ckpt_format_deprecated"
    ),
    "Megatron 0.19 has no code behind it; a run with --save does what it says": (
        "exit_signal_handler_for_dataloader"
    ),
    "it is on anyway": "ckpt_fully_parallel_save_deprecated",
    "it is off anyway": "disable_msc_deprecated",
    "its library, kitchen, is not used here": "use_kitchen_attention kitchen_attention_backend",
}
"""Reason -> destinations of the flags that cannot matter in this program."""

UNTRIED = {
    "its layers have not been trained with ProRes yet": """
        experimental_attention_variant linear_attention_freq
        """,
    "no weights have been sharded this way under ProRes yet": """
        use_torch_fsdp2 use_megatron_fsdp init_model_with_meta_device
        """,
    "no other optimizer than adam has trained a ProRes model yet": "optimizer",
    "alpha follows the iteration that the run is told, not the one that was saved": (
        "override_ckpt_iteration"
    ),
    "a run with --save listens to SIGTERM itself, and saves": "exit_signal_handler_for_training",
    "paths with msc:// have no manifest, no lock, and no comparison of ProRes settings": (
        "enable_msc"
    ),
    "nobody has run this program under ft_launcher yet": """
        enable_ft_package calc_ft_timeouts ft_num_warmup_iters
        """,
    "it makes ranks fail, and nobody has tried it with this program": """
        fault_injector_ranks fault_injector_num_ranks fault_injector_fault_types
        fault_injector_fault_probabilities fault_injector_fault_delay
        fault_injector_delay_start_iteration fault_injector_mtti_seconds
        fault_injector_offset_seconds fault_injector_seed
        """,
    "it makes results wrong on purpose, and nobody has tried it with this program": """
        error_injection_rate error_injection_type
        """,
    "without the package workload_inspector Megatron goes on without it": (
        "run_workload_inspector_server"
    ),
    "it runs code that comes with a tokenizer": "trust_remote_code",
}
"""Reason -> destinations of the flags that take effect, and that nobody has tried with ProRes."""


def effect_warnings(argv: Sequence[str]) -> list[str]:
    """List the flags of a command line that change nothing here, or that nobody has tried.

    Args:
        argv: Without the program's name; one that Megatron's parser takes.

    Returns:
        One line for each flag that is given with another value than its default.
    """
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(add_help=False, allow_abbrev=False))
    values, _ = parser.parse_known_args(argv)
    said = {
        **_by_destination(NO_EFFECT, "has no effect in pretrain_gpt_prores.py"),
        **_by_destination(UNTRIED, "is untried"),
    }
    typed = {word.split("=")[0] for word in argv if word.startswith("--")}
    return [
        f"{flag} {said[action.dest]}"
        for action in parser._actions
        for flag in action.option_strings
        if flag in typed and action.dest in said and getattr(values, action.dest) != action.default
    ]


def _by_destination(table: dict[str, str], verdict: str) -> dict[str, str]:
    return {
        destination: f"{verdict}: {reason}"
        for reason, destinations in table.items()
        for destination in destinations.split()
    }
