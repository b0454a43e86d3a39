"""The configuration files in SimpleTuner's Qwen edit quickstart, word for word, and functions that adapt them."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.narrow import make_pairs

CONFIG = """\
{
  "model_type": "lora",
  "model_family": "qwen_image",
  "model_flavour": "edit-v1",      // or "edit-v2"
  "train_batch_size": 1,
  "gradient_accumulation_steps": 4,
  "validation_resolution": "1024x1024",
  "validation_guidance": 4.0,
  "validation_num_inference_steps": 30,
  "mixed_precision": "bf16",
  "gradient_checkpointing": true,
  "base_model_precision": "int8-quanto",
  "quantize_via": "cpu",
  "quantize_activations": false,
  "flow_schedule_shift": 1.73,
  "data_backend_config": "config/qwen_edit/multidatabackend.json"
}
"""
EDIT_V1 = """\
[
  {
    "id": "my-edited-images",
    "type": "local",
    "instance_data_dir": "/datasets/edited-images",
    "caption_strategy": "textfile",
    "resolution": 1024,
    "conditioning_data": ["my-reference-images"],
    "conditioning_image_embeds": "my-reference-embeds",
    "cache_dir_vae": "cache/vae/edited-images"
  },
  {
    "id": "my-reference-images",
    "type": "local",
    "dataset_type": "conditioning",
    "instance_data_dir": "/datasets/reference-images",
    "conditioning_type": "reference_strict",
    "resolution": 1024,
    "cache_dir_vae": "cache/vae/reference-images"
  },
  {
    "id": "my-reference-embeds",
    "type": "local",
    "dataset_type": "conditioning_image_embeds",
    "cache_dir": "cache/conditioning_image_embeds/reference"
  }
]
"""
EDIT_V2 = """\
[
  {
    "id": "my-edited-images",
    "type": "local",
    "instance_data_dir": "/datasets/edited-images",
    "caption_strategy": "textfile",
    "resolution": 1024,
    "conditioning_data": [
      "my-reference-images-a",
      "my-reference-images-b",
      "my-reference-images-c"
    ],
    "cache_dir_vae": "cache/vae/edited-images"
  },
  {
    "id": "my-reference-images-a",
    "type": "local",
    "dataset_type": "conditioning",
    "instance_data_dir": "/datasets/reference-images-a",
    "conditioning_type": "reference_strict",
    "resolution": 1024,
    "cache_dir_vae": "cache/vae/reference-images-a"
  },
  {
    "id": "my-reference-images-b",
    "type": "local",
    "dataset_type": "conditioning",
    "instance_data_dir": "/datasets/reference-images-b",
    "conditioning_type": "reference_strict",
    "resolution": 1024,
    "cache_dir_vae": "cache/vae/reference-images-b"
  },
  {
    "id": "my-reference-images-c",
    "type": "local",
    "dataset_type": "conditioning",
    "instance_data_dir": "/datasets/reference-images-c",
    "conditioning_type": "reference_strict",
    "resolution": 1024,
    "cache_dir_vae": "cache/vae/reference-images-c"
  }
]
"""
SUFFIXES = ("-a", "-b", "-c")


def as_edit_v2(config: str) -> str:
    """The configuration with flavour edit-v2, which its comment offers."""
    return config.replace('"model_flavour": "edit-v1",      // or "edit-v2"', '"model_flavour": "edit-v2",')


def in_folders(data: str, folder: Path, count: int = 4, *, place: str = "") -> str:
    """Make small pairs in `folder` and return the data file with these folders in place of the printed ones.

    Paths are absolute, or `<place>/<folder name>` if `place` is given.
    """
    references = 3 if "reference-images-a" in data else 1
    pairs = make_pairs(folder, count, num_references=references)
    named = {"/datasets/edited-images": pairs.target_dir}
    suffixes = SUFFIXES if references > 1 else ("",)
    for suffix, each in zip(suffixes, pairs.reference_dirs, strict=True):
        named[f"/datasets/reference-images{suffix}"] = each
    for printed, there in named.items():
        name = f"{place}/{Path(there).name}" if place else there
        data = data.replace(json.dumps(printed), json.dumps(name))
    return data
