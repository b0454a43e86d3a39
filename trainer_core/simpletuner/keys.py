"""SimpleTuner's options that are left out, and why. Those of config.json are in options.json."""

from __future__ import annotations

import json
from pathlib import Path

from .section import words

_DATA = {
    "all data sets share one cache, cache_dir, so no other folder needs to be named": "cache_dir cache_dir_vae "
    "cache_dir_conditioning_image_embeds vae_cache_clear_each_epoch vae_cache_ondemand vae_cache_disable "
    "text_cache_ondemand text_cache_disable hash_filenames skip_file_discovery preserve_data_backend_cache "
    "cache_file_suffix image_embeds default compress_cache vae_cache_scan_behaviour scan_for_errors "
    "shorten_filenames csv_shorten_filenames csv_hash_filenames",
    "pictures are read and written by threads, without settings": "image_processing_batch_size max_workers "
    "read_batch_size aws_max_pool_connections",
    "encoding needs no batch size": "write_batch_size text_encoder_batch_size "
    "conditioning_image_embed_batch_size vae_batch_size",
    "the data set is used from the first to the last step": "start_epoch start_step end_epoch end_step",
    "pictures of every aspect ratio are trained on; remove those you don't want": "minimum_aspect_ratio "
    "maximum_aspect_ratio",
    "a crop is square or keeps the picture's shape": "crop_aspect_buckets max_upscale_threshold",
    "sizes are read from the pictures themselves": "metadata_backend metadata_update_interval",
    "all pairs in the folder are used": "max_num_samples",
    "no picture is ever deleted": "delete_unwanted_images delete_problematic_images delete_nsfw_images",
    "captions are read from files, or one text is used for all pairs": "captions",
    "it counts in an entry of type text_embeds": "caption_filter_list",
    "references are separate pictures, not made from the targets": "conditioning conditioning_config",
    "one LoRA is trained on all pairs alike": "slider_strength",
    "only local pictures are read": "aws_bucket_name aws_region_name aws_endpoint_url aws_access_key_id "
    "aws_secret_access_key aws_data_prefix csv_cache_dir csv_url_column huggingface webshart dataset_name config "
    "memory_filesystem_path memory_filesystem_size memory_filesystem_sudo aws_session_token hf_token revision split "
    "streaming image_column composite_image_column split_composite_images",
    "only pictures are supported": "video audio grounding s2v_datasets",
}

_TABLE = {
    "sizes are read from the pictures themselves": "width_column height_column",
    "targets are found with or without an extension": "identifier_includes_extension",
    "only pictures are supported": "bbox_column",
}


def _by_key(reasons: dict[str, str]) -> dict[str, str]:
    return {key: reason for reason, keys in reasons.items() for key in words(keys)}


_OPTIONS: dict[str, list[str]] = json.loads(Path(__file__).with_name("options.json").read_text("utf-8"))["left_out"]
CONFIG_REASONS = {option: reason for reason, options in _OPTIONS.items() for option in options}
DATA_REASONS = _by_key(_DATA)
TABLE_REASONS = _by_key(_TABLE)
