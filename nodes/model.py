"""Nodes that choose the base model. They load no weights; the nodes that use the model do."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..trainer_core.config import ModelConfig
from . import host_folders, sockets
from .schema import Node, new_input, new_output, node_schema, setting_inputs


class LoadModel(Node):
    """Choose a base model in diffusers layout."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        choices = host_folders.base_models()
        return node_schema(
            "LoadModel",
            "Load Qwen Edit Model",
            description="Chooses the base model to train on and its precision. Does not load it yet.",
            search_aliases=["qwen image edit", "base model", "lora training"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                new_input(
                    io.Combo,
                    "base_model",
                    options=choices,
                    default=choices[0],
                    tooltip="A Qwen-Image-Edit model in diffusers layout in models/diffusers (a folder with "
                    "transformer, vae and text_encoder), or the small embedded demo model.",
                ),
                *setting_inputs(ModelConfig, "flavour base_model_precision mixed_precision"),
                *setting_inputs(
                    ModelConfig,
                    "text_encoder_precision quantize_activations quantised_cache_gb quantize_via matmul_precision",
                    optional=True,
                    advanced=True,
                ),
            ],
            outputs=[new_output(sockets.Model, "model", "The chosen model, for the encode, train and sample nodes.")],
        )

    @classmethod
    def validate_inputs(cls, base_model: str | None = None) -> bool | str:
        """Check that the base model is listed."""
        return base_model is None or bool(host_folders.base_model(base_model))

    @classmethod
    def execute(cls, base_model: str, **widgets: Any) -> io.NodeOutput:
        """Outputs a ModelConfig."""
        from ..trainer_core.qwen_image.base_model import BaseModel

        base, tokenizer = host_folders.base_model(base_model)
        config = ModelConfig(
            base=base,
            tokenizer=tokenizer,
            device=host_folders.device_name(),
            quantised_cache_dir=quantised_dir(),
            **widgets,
        )
        _ = BaseModel(config).network_settings  # raises if files are missing or the flavour is wrong
        return io.NodeOutput(config)


def quantised_dir() -> str:
    """ModelConfig's folder for quantised weights."""
    return str(host_folders.cache_dir() / "quantised")


_KINDS = {"transformer": "diffusion_models", "text_encoder": "text_encoders", "vae": "vae"}
_TOOLTIPS = {
    "transformer": "A Qwen-Image-Edit file in models/diffusion_models (bf16, fp16, fp8, int8 or GGUF), or a diffusers "
    "transformer folder there. bf16 is best.",
    "text_encoder": "The Qwen2.5-VL-7B file in models/text_encoders (bf16 or fp8), or its Hugging Face folder there.",
    "vae": "The Qwen-Image VAE in models/vae: a file or a diffusers VAE folder.",
}


class LoadModelFiles(Node):
    """Choose a base model from the files or folders that ComfyUI uses for inference."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        files = [
            new_input(io.Combo, f"{part}_file", options=host_folders.model_files(folder), tooltip=_TOOLTIPS[part])
            for part, folder in _KINDS.items()
        ]
        return node_schema(
            "LoadModelFiles",
            "Load Qwen Edit Model Files",
            description="Chooses the base model from ComfyUI's model files, and its precision. Does not load it yet.",
            search_aliases=["qwen image edit", "base model", "fp8", "gguf", "single file", "lora training"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                *files,
                *setting_inputs(ModelConfig, "flavour base_model_precision mixed_precision quantize_via"),
                *setting_inputs(
                    ModelConfig,
                    "text_encoder_precision quantize_activations quantised_cache_gb matmul_precision",
                    optional=True,
                    advanced=True,
                ),
            ],
            outputs=[new_output(sockets.Model, "model", "The chosen model, for the encode, train and sample nodes.")],
        )

    @classmethod
    def validate_inputs(
        cls, transformer_file: str | None = None, text_encoder_file: str | None = None, vae_file: str | None = None
    ) -> bool | str:
        """Check that the files are listed."""
        named = zip(_KINDS.values(), (transformer_file, text_encoder_file, vae_file), strict=True)
        return all(name is None or host_folders.model_file(folder, name) for folder, name in named)

    @classmethod
    def execute(cls, transformer_file: str, text_encoder_file: str, vae_file: str, **widgets: Any) -> io.NodeOutput:
        """Outputs a ModelConfig. Reads the header of the transformer file, so that a wrong file fails at once."""
        from ..trainer_core.qwen_image.base_model import BaseModel

        config = ModelConfig(
            transformer_file=host_folders.model_file("diffusion_models", transformer_file),
            text_encoder_file=host_folders.model_file("text_encoders", text_encoder_file),
            vae_file=host_folders.model_file("vae", vae_file),
            tokenizer=host_folders.tokenizer_dir(),
            device=host_folders.device_name(),
            quantised_cache_dir=quantised_dir(),
            **widgets,
        )
        _ = BaseModel(config).network_settings  # raises if files are missing or the flavour is wrong
        return io.NodeOutput(config)
