"""Prepares a run: checks its settings, reads its files' headers and plans its memory, without reading weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from ..adapters.frozen_loras import read_frozen_loras
from ..adapters.plan import AdapterPlan, plan_adapter
from ..adapters.reader import AdapterPart
from ..adapters.second_lora import read_second_lora
from ..conditioning.batches import check_differences, check_empty_captions, check_preservation
from ..conditioning.encoded import EncodedDataset, check_alike, load_encoded
from ..conditioning.encoding_plan import PlannedDataset
from ..config import ModelConfig, NoiseConfig, TrainConfig, ValidationConfig
from ..device import pick_device
from ..errors import ConfigError, DatasetError, Problems
from ..memory.placement import blocks_on_host, check_compiler
from ..precision.eight_bit import check_device
from ..precision.quantise import converter
from ..qwen_image.base_model import BaseModel
from ..qwen_image.flavours import title_of
from ..qwen_image.sampling import schedule_of
from ..qwen_image.vae import check_vae
from ..runs.metrics import check_tensorboard
from ..text import shown
from ..training.optimizer import optimizer_builder
from ..training.validation_pictures import incomparable, validation_shots
from .advice import STEP, VALIDATION, memory_advice, memory_errors_explained
from .choose import budget_of, choose_memory
from .network import NetworkSize, network_size
from .plan import MemoryPlan, plan_memory
from .report import plan_report, unused_in_words, verdict
from .workload import Workload, pictures_in_prompt, workload_of_encoded, workload_of_pairs

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """The base model, the plan of its adapter, and the size of both. `few_step_lora`: the weight changes of
    `validation_lora`; empty without one."""

    base: BaseModel
    adapter: AdapterPlan
    size: NetworkSize
    few_step_lora: Mapping[str, AdapterPart]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """Everything known about a run before weights are read.

    `config` has the chosen memory settings. `held_out` is the dataset whose held-out pairs validation uses; it can be
    the same as `encoded`.
    """

    config: TrainConfig
    model: PreparedModel
    encoded: EncodedDataset
    held_out: EncodedDataset
    work: Workload

    def memory_plan(self) -> MemoryPlan:
        """The memory plan of the run."""
        return plan_memory(self.config, self.model.size, self.work)

    def explain_memory_errors(self, phases: tuple[str, ...], during: str, kept: str) -> AbstractContextManager[None]:
        """A context that adds advice to out-of-memory errors; see `memory_errors_explained`."""
        return memory_errors_explained(self.memory_plan, phases, during, kept)


def prepare_model(config: TrainConfig, base: BaseModel) -> PreparedModel:
    """Read the base model's headers and plan the adapter.

    Raises:
        ConfigError: a layer pattern matches nothing, or `init_lora` doesn't match the settings.
        ModelFileError: the transformer's files are missing or wrong, or a LoRA file belongs to another model.
        JobError: several of these.
    """
    network, problems, name = base.network, Problems(), config.validation.validation_lora
    adapter = problems.attempt(lambda: plan_adapter(network, config.lora))
    problems.attempt(lambda: read_frozen_loras(base))
    few_step = problems.attempt(lambda: read_second_lora(network, Path(name)) if name else {})
    problems.raise_all()
    assert adapter is not None
    assert few_step is not None
    size = network_size(network, adapter, base.config, base.bytes_per_weight, few_step)
    return PreparedModel(base, adapter, size, few_step)


def check_training(config: TrainConfig, base: BaseModel) -> PreparedModel:
    """Check the settings against device, packages and base model before hours of encoding or loading.

    Raises:
        ConfigError: as `prepare_model`; blocks_to_stream is too high; the optimizer or device isn't available here.
        ModelFileError: as `prepare_model`.
        MissingPackageError, PackageError: a package that a setting needs is not installed, or is too old.
        JobError: several of these.
    """
    problems = Problems()
    problems.attempt(check_tensorboard)
    device = problems.attempt(lambda: pick_device(config.model.device))
    if device is not None:
        problems.attempt(lambda: check_compiler(config.memory, device))
        problems.attempt(lambda: optimizer_builder(config.optimizer, device))
        if config.model.matmul_precision == "8bit":
            problems.attempt(lambda: check_device(device, "matmul_precision 8bit"))
    problems.attempt(lambda: converter(config.model.text_encoder_precision))
    problems.attempt(lambda: converter(config.model.base_model_precision))
    checkpointing = config.gradient_checkpointing
    if config.memory.memory == "manual":  # auto only chooses possible values
        problems.attempt(lambda: blocks_on_host(config.memory, base.num_blocks, checkpointing=checkpointing))
    problems.attempt(lambda: check_vae(base))
    problems.attempt(lambda: schedule_of(base, config.validation.drawing))
    model = problems.attempt(lambda: prepare_model(config, base))
    if model is not None:
        problems.attempt(lambda: _check_codes(config.model, base))
    problems.raise_all()
    assert model is not None
    return model


def _check_codes(model: ModelConfig, base: BaseModel) -> None:
    """Raises ConfigError if products shall have 8 bits, but the file's weights are kept and have more."""
    if model.matmul_precision == "8bit" and model.base_model_precision == "file" and base.bytes_per_weight >= 2:
        raise ConfigError(
            f"matmul_precision is 8bit, but {base.transformer_weights.place.name} has weights that are not quantised. "
            "Set base_model_precision to int8-quanto, or matmul_precision to auto."
        )


def prepare_training(config: TrainConfig, model: PreparedModel | None = None, *, processes: int = 1) -> Preparation:
    """Load the datasets' manifests, check everything, and with `memory` auto choose the memory settings.

    `model`: the result of `check_training`, if it was called before. `processes`: how many share this machine's memory.

    Raises:
        ConfigError, ModelFileError, MissingPackageError: as `check_training`; the dataset is for another flavour.
        DatasetError: encoded pairs are missing, or there is no pair to train on.
        OutOfMemoryError: `memory` is auto and no settings fit.
    """
    encoded = load_encoded(Path(config.encoded))
    held_out = load_encoded(Path(config.validation_encoded)) if config.validation_encoded else encoded
    check_datasets(config, encoded, held_out)
    for each in (encoded, held_out):
        if missing := each.missing():
            raise DatasetError(f"The cache lacks {len(missing)} encoded pairs. Encode the dataset again:", missing)
    if trained := encoded.trained_too(held_out):
        _LOG.info(
            "%d of %d validated pairs are also trained on: the validation loss is partly a loss on training pairs.",
            trained,
            len(held_out.validation_pairs),
        )
    model = model or check_training(config, BaseModel(config.model))
    work = workload_of_encoded(encoded, config.batching, config.validation, held_out)
    budget = budget_of(pick_device(config.model.device), config.memory.vram_gib, processes=processes)
    if config.memory.memory == "manual":
        if not budget.holds(plan := plan_memory(config, model.size, work)):
            _LOG.warning("%s Trying anyway. %s", verdict(plan, budget), memory_advice(plan, STEP + VALIDATION))
    else:
        plan = choose_memory(config, model.size, work, budget)
        _LOG.info("%s", plan_report(plan, budget))
        if unused := unused_in_words(config):
            _LOG.info("%s", unused)
        config = plan.config
    return Preparation(config=config, model=model, encoded=encoded, held_out=held_out, work=work)


def unmeasured(held_out: EncodedDataset, config: ValidationConfig) -> str:
    """Why validation pictures of a run will not be compared with their targets; empty if all will."""
    return incomparable(validation_shots(held_out, config))


def check_memory(
    config: TrainConfig,
    network: NetworkSize,
    parts: Sequence[PlannedDataset],
    processes: int,
    *,
    is_all: bool,
    held_leaves: bool = False,
) -> None:
    """Check, before trained datasets are encoded, that some memory settings fit, if `memory` is auto.

    `is_all`: their held-out pairs are those that the run validates. Otherwise validation is left out. `held_leaves` is
    as in `budget_of`.

    Raises:
        OutOfMemoryError: none fits, however short the captions are.
    """
    if config.memory.memory == "auto":
        validation = config.validation if is_all else replace(config.validation, num_validation_images=0)
        work = workload_of_pairs(parts, config.batching, validation, pictures_in_prompt)
        device, card = pick_device(config.model.device), config.memory.vram_gib
        budget = budget_of(device, card, processes=processes, held_leaves=held_leaves)
        choose_memory(config, network, work, budget)


def without_references(encoded: EncodedDataset) -> str:
    """A sentence that says that the run learns no edits, because no pair has a reference; "" if one has."""
    if any(pair.references for pair in encoded.pairs):
        return ""
    return "No pair to train on has a reference, so the run trains text-to-image and no edits."


def check_datasets(config: TrainConfig, encoded: EncodedDataset, held_out: EncodedDataset) -> None:
    """Check that the datasets match the model and each other. Their pairs need not be encoded yet.

    `held_out` is the dataset with the held-out pairs; it can be the same as `encoded`.

    Raises:
        ConfigError: a dataset is for another flavour, they were encoded differently, prompts or pixel differences are
            missing, or noise levels are shifted that are not logit-normal.
        DatasetError: there is no pair to train on, all are regularisation data, or the validation dataset has no
            held-out pair.
        JobError: several of these.
    """
    for each in (encoded, held_out):
        if each.flavour != config.model.flavour:
            raise ConfigError(
                f"The dataset was encoded for {title_of(each.flavour)}, but the model is "
                f"{title_of(config.model.flavour)}. "
                "Encode it again with this model."
            )
    check_alike(encoded, held_out, ("The encoded dataset", "the validation dataset"))
    if not encoded.pairs:
        raise DatasetError(
            "The dataset has no pairs to train on: all are held out. Set num_eval_images lower, to 0 or more."
        )
    if encoded.pairs and all(pair.is_regularisation for pair in encoded.pairs):
        raise DatasetError(
            "All pairs to train on are regularisation data, from which the model learns nothing new. Add a dataset of "
            "edits, or turn is_regularisation_data off."
        )
    if not held_out.validation_pairs and held_out is not encoded:
        raise DatasetError("The validation dataset has no held-out pairs. Encode it with num_eval_images -1.")
    problems = Problems()
    problems.attempt(lambda: check_empty_captions(encoded, config.batching))
    problems.attempt(lambda: check_preservation(encoded, config.preservation))
    problems.attempt(lambda: check_differences(encoded.pairs, config.noise))
    problems.attempt(lambda: _check_offsets(encoded, config.noise))
    problems.raise_all()


def _check_offsets(encoded: EncodedDataset, noise: NoiseConfig) -> None:
    shifted = next((pair for pair in encoded.pairs if pair.timestep_sampling_offset), None)
    if shifted is not None and noise.sigma_distribution != "logit_normal":
        raise ConfigError(
            f"timestep_sampling_offset of the pair {shown(shifted.key)!r} is {shifted.timestep_sampling_offset:g}, but "
            f"sigma_distribution is {noise.sigma_distribution}. Set timestep_sampling_offset to 0 or "
            "sigma_distribution to logit_normal."
        )
