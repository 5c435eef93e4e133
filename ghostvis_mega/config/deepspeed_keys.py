"""What DeepSpeed 0.19.8 knows in its JSON, and what this project does with each key.

Listed by hand from deepspeed/runtime/config.py, zero/config.py and precision_config.py, so that a
wrong file is reported without importing DeepSpeed (seconds, and torch).
"""

RESOLVED = frozenset(
    {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "zero_optimization",
        "bf16",
        "bfloat16",
        "fp16",
        "data_types",
        "communication_data_type",
        "optimizer",
        "scheduler",
        "steps_per_print",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "managed_gradient_accumulation",
        "gradient_allreduce_op",
        "gradient_predivide_factor",
    }
)
"""Top-level keys whose value is checked and filled in."""

PASSED_ON = frozenset(
    {"log_level", "dump_state", "disable_python_gc", "comms_logger", "memory_breakdown"}
)
"""Top-level keys that DeepSpeed gets as they are."""

_CHECKPOINTS = "checkpoints are this project's own (section checkpoint)"
_PARALLEL = "degrees are set in the section parallel"
_LOGGING = "metrics are written by the training loop (section log)"
_ENGINE = "DeepSpeed's own forward and backward are not called, so it would do nothing"
_GONE = "DeepSpeed has removed it"

REFUSED = {
    "activation_checkpointing": "activation checkpointing is train.recompute",
    "tensorboard": _LOGGING,
    "wandb": _LOGGING,
    "csv_monitor": _LOGGING,
    "comet": _LOGGING,
    "checkpoint": _CHECKPOINTS,
    "datastates_ckpt": _CHECKPOINTS,
    "pipeline": _PARALLEL,
    "tensor_parallel": _PARALLEL,
    "expert_parallel": _PARALLEL,
    "sequence_parallel_size": _PARALLEL,
    "data_parallel_size": _PARALLEL,
    "use_data_before_expert_parallelism": _PARALLEL,
    "seq_parallel_communication_data_type": _PARALLEL,
    "data_efficiency": "batches come from the prepared dataset (section data)",
    "dataloader_drop_last": "batches come from the prepared dataset (section data)",
    "flops_profiler": _ENGINE,
    "wall_clock_breakdown": _ENGINE,
    "timers": _ENGINE,
    "hybrid_engine": _ENGINE,
    "compile": _ENGINE,
    "torch_autocast": "the precision is train.precision",
    "autotuning": "it starts runs of its own",
    "aio": "nothing is offloaded to a disk",
    "weight_quantization": "weights are quantised at export",
    "vocabulary_size": "the vocabulary is model.llm.vocab_size",
    "prescale_gradients": "gradients are scaled once, by the trained tokens of the global batch",
    "disable_allgather": "updated parameters have to be gathered",
    "nebula": _GONE,
    "compression_training": _GONE,
    "amp": _GONE,
    "quantize_training": _GONE,
    "sparse_gradients": _GONE,
    "eigenvalue": _GONE,
    "sparse_attention": _GONE,
    "elasticity": _GONE,
    "graph_harvesting": _GONE,
    "curriculum_learning": _GONE,
    "progressive_layer_drop": _GONE,
}
"""Top-level keys that must be off, with the reason."""

TOP_LEVEL = RESOLVED | PASSED_ON | frozenset(REFUSED)

ZERO_RESOLVED = frozenset(
    {
        "stage",
        "overlap_comm",
        "contiguous_gradients",
        "compute_grad_norm",
        "reduce_bucket_size",
        "offload_optimizer",
    }
)

OFFLOAD = frozenset(
    {
        "device",
        "pin_memory",
        "ratio",
        "nvme_path",
        "buffer_count",
        "pipeline_read",
        "pipeline_write",
        "fast_init",
        "super_offload",
        "cpuadam_cores_perc",
    }
)
"""Keys of `zero_optimization.offload_optimizer`."""

_DISK = "only a disk has use for it, and device is cpu"

OFFLOAD_REFUSED = {
    "nvme_path": _DISK,
    "pipeline_read": _DISK,
    "pipeline_write": _DISK,
    "fast_init": _DISK,
    "super_offload": "it brings an optimizer and a clip of its own",
    "cpuadam_cores_perc": "only super_offload has use for it",
}
"""Those that must be off, with the reason."""

ZERO_SIZES = frozenset(
    {
        "allgather_bucket_size",
        "sub_group_size",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_model_persistence_threshold",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_module_granularity_threshold",
    }
)
"""Numbers of `zero_optimization` that DeepSpeed gets as they are."""

ZERO_SWITCHES = frozenset(
    {
        "reduce_scatter",
        "allgather_partitions",
        "use_multi_rank_bucket_allreduce",
        "load_from_fp32_weights",
        "ignore_unused_parameters",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_use_all_reduce_for_fetch_params",
        "stage3_allgather_sequential",
        "memory_efficient_linear",
        "log_trace_cache_warnings",
        "enable_sanity_checks",
    }
)
"""Switches of `zero_optimization` that DeepSpeed gets as they are."""

_OFFLOAD = "of all states only the optimizer's go to the host (offload_optimizer)"
_OLD_OFFLOAD = 'DeepSpeed calls it offload_optimizer: {"device": "cpu"} by now'
_QUANTISED = "quantised or hierarchical communication (ZeRO++) is not supported in this version"
_UNPROVED = "the one reduction per step has not been proved with it"

ZERO_REFUSED = {
    "offload_param": _OFFLOAD,
    "cpu_offload": _OLD_OFFLOAD,
    "cpu_offload_param": _OFFLOAD,
    "cpu_offload_use_pin_memory": _OLD_OFFLOAD,
    "zenflow": "it updates with gradients of earlier steps",
    "save_muon_momentum_buffer_in_memory": "the optimizer is AdamW",
    "zero_hpz_partition_size": _QUANTISED,
    "zero_quantized_weights": _QUANTISED,
    "zero_quantized_nontrainable_weights": _QUANTISED,
    "zero_quantized_gradients": _QUANTISED,
    "legacy_stage1": _UNPROVED,
    "round_robin_gradients": _UNPROVED,
    "parameter_alignment": _UNPROVED,
    "leaf_module": _UNPROVED,
    "pipeline_loading_checkpoint": _CHECKPOINTS,
    "elastic_checkpoint": _CHECKPOINTS,
    "stage3_gather_fp16_weights_on_model_save": _CHECKPOINTS,
    "override_module_apply": _UNPROVED,
    "mics_shard_size": _GONE,
    "mics_hierarchical_params_gather": _GONE,
    "zeropp_loco_param": _GONE,
}
"""Keys of `zero_optimization` that must be off, with the reason."""

ZERO = ZERO_RESOLVED | ZERO_SIZES | ZERO_SWITCHES | frozenset(ZERO_REFUSED)

BF16 = frozenset(
    {
        "enabled",
        "check_grad_overflow",
        "immediate_grad_update",
        "bf16_master_weights_and_grads",
        "bf16_optimizer_states",
    }
)
BF16_REFUSED = {
    "check_grad_overflow": "whether a step is taken is decided once, over both engines",
    "immediate_grad_update": "gradients are handed over once a step",
    "bf16_master_weights_and_grads": "master weights are kept in fp32",
    "bf16_optimizer_states": "optimizer states are kept in fp32",
}
DATA_TYPES = frozenset({"grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"})
