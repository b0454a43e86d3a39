"""What can be refused before a pair is encoded or a weight is read, which may take hours."""

from __future__ import annotations

from ..adapters.plan import plan_layers
from ..config import TrainConfig
from ..device import pick_device
from ..memory.placement import blocks_on_host, check_compiler
from ..precision.quantise import converter
from ..qwen_image.lighten import lighten
from ..qwen_image.transformer import check_transformer, empty_transformer
from ..runs.metrics import check_tensorboard
from ..training.optimizer import optimizer_builder


def check_training(config: TrainConfig) -> None:
    """See whether the settings suit the base model, the device and the installed packages, from headers alone.

    Raises:
        ConfigError: a pattern that matches no layer, more blocks to stream than can be, an optimizer or a device that
            is not to be had here.
        ModelFileError: no such transformer, or an `init_lora` that is not for it.
        MissingPackageError: a setting needs one.
    """
    check_tensorboard()
    check_compiler(config.memory)
    optimizer_builder(config.optimizer, pick_device(config.model.device))
    for precision in (config.model.text_encoder_precision, config.model.base_model_precision):
        converter(precision)
    settings = check_transformer(config.model)
    if config.memory.memory == "manual":  # otherwise they are chosen
        blocks_on_host(config.memory, int(settings["num_layers"]), checkpointing=config.gradient_checkpointing)
    network = empty_transformer(settings)
    lighten(network)
    plan_layers(network, config.lora)
