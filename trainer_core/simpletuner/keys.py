"""Keys in SimpleTuner's documents (Qwen edit, Kontext, dataloader, scheduled sampling) that are left out, and why."""

from __future__ import annotations

from .section import words

_CONFIG = {
    "ema_device decides where the EMA is updated": "ema_cpu_only ema_foreach_disable",
    "nothing is uploaded": "push_to_hub push_checkpoints_to_hub hub_model_id hub_token model_card_private "
    "model_card_note model_card_safe_for_work push_to_hub_background",
    "metrics are written to TensorBoard files and metrics.jsonl in the run folder": "report_to tracker_run_name "
    "tracker_project_name logging_dir webhook_config webhook_reporting_interval",
    "held-out pairs are sampled with their captions; add more prompts in encoding.validation_prompts": (
        "validation_prompt_library user_prompt_library num_validation_images validation_input"
    ),
    "validation uses the model and noise schedule of training": "validation_noise_scheduler validation_torch_compile "
    "validation_torch_compile_mode validation_preview validation_preview_steps validation_guidance_rescale "
    "validation_guidance_skip_layers validation_using_datasets validation_stitch_input_location "
    "validation_disable_unconditional validation_lycoris_strength validation_lora_strength validation_on_startup "
    "validation_num_video_frames validation_epoch_interval evaluation_type",
    "the base model's picture is always in the grid and sampled once": "disable_benchmark",
    "the loss of held-out pairs is always measured, with fixed noise": "eval_steps_interval eval_epoch_interval "
    "eval_timesteps eval_dataset_pooling",
    "there is one text encoder": "text_encoder_2_precision",
    "noise levels are logit-normal, uniform, mode or cosmap": "flow_use_beta_schedule flow_beta_schedule_alpha "
    "flow_beta_schedule_beta flow_custom_timesteps flux_fast_schedule input_perturbation input_perturbation_steps "
    "noise_offset offset_noise noise_offset_probability",
    "the loss compares velocities, with equal weight for every noise level": "snr_gamma use_soft_min_snr "
    "prediction_type masked_loss_probability",
    "a run resumes from its newest checkpoint automatically": "resume_from_checkpoint delete_invalid_checkpoints "
    "checkpointing_use_tempdir checkpoint_epoch_interval checkpointing_rolling_steps checkpoint_step_rolling_interval "
    "checkpoints_rolling_total_limit",
    "networks are loaded one at a time, so there is nothing to set": "offload_during_startup "
    "unload_text_encoder keep_vae_loaded vae_enable_tiling vae_enable_slicing vae_dtype vae_batch_size "
    "text_encoder_batch_size write_batch_size read_batch_size image_processing_batch_size max_workers "
    "aws_max_pool_connections torch_num_threads dataloader_prefetch dataloader_prefetch_qlen base_model_default_dtype "
    "attention_mechanism fuse_qkv_projections gradient_precision allow_tf32 "
    "disable_tf32 fused_qkv_projections conditioning_image_embed_batch_size",
    "memory is auto, which chooses what is recomputed, offloaded and compiled": "gradient_checkpointing_interval "
    "gradient_checkpointing_backend enable_group_offload dynamo_backend",
    "encoded pairs are cached by content, so nothing needs to be scanned or cleared": "cache_dir cache_dir_vae "
    "cache_dir_text cache_file_suffix vae_cache_ondemand vae_cache_disable vae_cache_scan_behaviour "
    "vae_cache_clear_each_epoch vae_cache_preprocess text_cache_ondemand text_cache_disable skip_file_discovery "
    "preserve_data_backend_cache override_dataset_config compress_disk_cache metadata_update_interval",
    "buckets have no minimum size; a small bucket gives smaller batches": "disable_bucket_pruning "
    "allow_dataset_oversubscription aspect_bucket_rounding ignore_missing_files",
    "each pair is used once per epoch, or as repeats and probability of its data set say": "data_backend_sampling",
    "no picture is ever deleted": "delete_unwanted_images delete_problematic_images delete_nsfw_images",
    "pictures are not classified": "enable_nsfw_check nsfw_check_models nsfw_check_min_votes "
    "nsfw_check_backend_types nsfw_check_sample_types",
    "optimizers are used with the defaults of their libraries": "optimizer_config optimizer_cpu_offload_method "
    "optimizer_offload_gradients optimizer_release_gradients fuse_optimizer adam_bfloat16 use_8bit_adam "
    "use_adafactor_optimizer",
    "the learning rate is used unscaled, and its schedule counts steps": "lr_scale lr_scale_sqrt lr_warmup_epochs",
    "the LoRA starts at zero, in peft's standard form": "init_lora_step lora_init_type peft_lora_mode "
    "lycoris_config lora_format flux_lora_target singlora_ramp_up_steps",
    "torchrun or accelerate sets the number of processes": "num_processes num_machines ddp_backend "
    "accelerator_cache_clear_interval "
    "fsdp_enable deepspeed_config i_know_what_i_am_doing",
    "only edit LoRAs are trained": "controlnet control tread_config text_encoder_lora train_text_encoder "
    "distillation_method max_grounding_entities",
    "the folder determines the model files": "revision variant cache_dir_hf pretrained_model_revision",
    "prompts are encoded at their full length": "tokenizer_max_length",
    "it is for debugging SimpleTuner": "debug_dataset_loader print_filenames print_sampler_statistics",
}

_DATA = {
    "one cache, keyed by content, serves everything, so no folder needs to be named": "cache_dir cache_dir_vae "
    "cache_dir_conditioning_image_embeds vae_cache_clear_each_epoch vae_cache_ondemand vae_cache_disable "
    "text_cache_ondemand text_cache_disable hash_filenames skip_file_discovery preserve_data_backend_cache "
    "cache_file_suffix text_embeds image_embeds default",
    "encoding needs no batch size": "write_batch_size text_encoder_batch_size "
    "conditioning_image_embed_batch_size vae_batch_size",
    "the data set is used from the first to the last step": "start_epoch start_step end_epoch end_step",
    "pictures of every aspect ratio are trained on; remove those you don't want": "minimum_aspect_ratio "
    "maximum_aspect_ratio",
    "a crop is square or keeps the picture's shape": "crop_aspect_buckets max_upscale_threshold",
    "sizes are read from the pictures themselves": "metadata_backend metadata_update_interval",
    "all pairs in the folder are used": "max_num_samples",
    "no picture is ever deleted": "delete_unwanted_images delete_problematic_images delete_nsfw_images",
    "captions are used unchanged": "caption_shuffle caption_filter_list fallback_caption_column captions",
    "references are separate pictures, not made from the targets": "conditioning",
    "one LoRA is trained on all pairs alike": "is_regularisation_data is_regularization_data slider_strength",
    "only local pictures are read": "aws_bucket_name aws_region_name aws_endpoint_url aws_access_key_id "
    "aws_secret_access_key aws_data_prefix csv_cache_dir csv_url_column huggingface webshart dataset_name config "
    "memory_filesystem_path memory_filesystem_size memory_filesystem_sudo",
    "only pictures are supported": "video audio grounding s2v_datasets",
}

_TABLE = {
    "sizes are read from the pictures themselves": "width_column height_column",
    "every target needs its row": "fallback_caption_column",
    "targets are found with or without an extension": "identifier_includes_extension",
    "only pictures are supported": "bbox_column",
}


def _by_key(reasons: dict[str, str]) -> dict[str, str]:
    return {key: reason for reason, keys in reasons.items() for key in words(keys)}


CONFIG_REASONS = _by_key(_CONFIG)
DATA_REASONS = _by_key(_DATA)
TABLE_REASONS = _by_key(_TABLE)
