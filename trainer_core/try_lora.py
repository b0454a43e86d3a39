"""Draws one picture with the LoRA of a run: a held-out pair exactly as its validation draws it, or another picture.

Model, pairs and sampling settings are the run's own, from its folder.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from .adapters.plan import read_parts
from .adapters.second_lora import read_second_lora
from .conditioning.encoded import EncodedDataset, load_encoded
from .conditioning.entry import EncodedEntry
from .conditioning.pictures import to_picture
from .config import ModelConfig, TrainConfig, from_json
from .device import pick_device, release_memory
from .errors import ConfigError, DatasetError, ModelFileError, RunFolderError
from .events import SILENT, Observer, SampleReport
from .geometry import Size, bucket_size
from .json_text import read_json
from .pictures.grid import GridRow, save_picture, validation_grid
from .pictures.sample_pictures import save_sample_pictures
from .qwen_image.base_model import BaseModel
from .runs.folder import RunFolder
from .runs.step_loras import StepLora, step_loras
from .sample import SampleRequest, load_with_lora, sample_edit
from .training.ema import AVERAGE, TRAINED
from .training.validation import Validator
from .training.validation_pictures import Shot, own_size, plan_shots

_STEP_OF_RESOLUTION = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What to draw. `model`: the run's model as it is found on this machine now. `step`: a step whose LoRA was kept; 0
    for the end, or for the newest one of a run that has not ended. `pair`: number of the validation picture, from 1.

    With `picture` or `instruction`, that picture (default: the pair's references) is edited as that text (default: the
    pair's) says.
    """

    run: TriedRun
    model: ModelConfig
    step: int = 0
    strength: float = 1.0
    pair: int = 1
    picture: Image.Image | None = None
    instruction: str = ""


@dataclass(frozen=True, slots=True)
class TriedRun:
    """A run's settings, its encoded pairs, and its LoRAs."""

    folder: RunFolder
    config: TrainConfig
    encoded: EncodedDataset

    def with_few_step_lora(self, file: str) -> TriedRun:
        """The run with its few-step LoRA at this path; empty if it has none."""
        validation = replace(self.config.validation, validation_lora=file)
        return replace(self, config=replace(self.config, validation=validation))

    @property
    def shots(self) -> tuple[Shot, ...]:
        """All pictures that validation can draw; those that it does draw come first, in their order."""
        return plan_shots(self.encoded.validation_pairs, self.config.validation.sizes)

    def lora_at(self, step: int) -> tuple[int, Path]:
        """The step and the LoRA file that a `step` of Trial means. It holds the weights that validation shows.

        Raises:
            ConfigError: the run has no such LoRA.
        """
        kept = {lora.step: lora for lora in step_loras(self.folder.samples)}
        result = self.folder.state().get("result")
        if not step and result:
            shows_average = self.config.ema.use_ema and self.config.ema.ema_validation == "ema_only"
            name = result.get("ema_file") if shows_average else None
            return int(result["steps"]), self.folder.path / (name or result["lora_file"])
        if not step and kept:
            step = max(kept)
        if step in kept:
            return step, kept[step].files[0]
        name = self.folder.path.name
        if not kept and not result:
            raise ConfigError(f"The run {name!r} has no LoRA yet. The first validation of the run makes one.")
        raise ConfigError(f"The LoRA of step {step} of the run {name!r} is not kept. {_offer(kept)}")


def _offer(kept: dict[int, StepLora]) -> str:
    steps = ", ".join(str(step) for step in kept)
    return f"Choose one of its steps ({steps}), or 0 for the end." if kept else "Choose step 0, the end."


@dataclass(frozen=True, slots=True)
class Tried:
    """Where the pictures of a trial are. `folder` has them one by one with an index; see `sample_pictures`.

    `report`: how a held-out pair compares with its target; None for another picture.
    """

    grid_file: Path
    folder: Path
    step: int
    report: SampleReport | None


def tried_run(run_dir: Path, cache_dir: Path) -> TriedRun:
    """Read what a trial needs of a run. Its pairs are looked for in `cache_dir`; the path in its settings is not used.

    Raises:
        RunFolderError: the folder isn't a run, or its config.json is missing or damaged.
        DatasetError: the encoded pairs are missing or damaged.
    """
    folder = RunFolder(run_dir)

    def unreadable(problem: str) -> RunFolderError:
        return RunFolderError(f"The run {run_dir.name!r} can't be tried. {problem}")

    if not folder.state():
        raise unreadable("There is no such run. Choose another run_name.")
    values = read_json(run_dir / "config.json", "Its config.json", finite=False, error=unreadable)
    config = from_json(TrainConfig, values)
    manifest = cache_dir / "datasets" / Path(config.validation_encoded or config.encoded).name
    if not manifest.is_file():
        raise DatasetError(
            f"The encoded pairs of the run {run_dir.name!r} are no longer in the cache. Encode its data set again with "
            "the same graph."
        )
    return TriedRun(folder, config, load_encoded(manifest))


def try_lora(trial: Trial, folder: Path, observer: Observer = SILENT) -> Tried:
    """Draw the picture and save it to `folder`, with a grid beside it.

    Raises:
        ConfigError: the run has no such LoRA or no such pair.
        ModelFileError: the run's model is gone or another one, or the LoRA file is damaged.
        DatasetError: the pair's entries in the cache are missing or damaged.
        Interrupted: the observer wants to stop.
    """
    step, lora_file = trial.run.lora_at(trial.step)
    shot = _shot(trial)
    with _model_explained(trial.run):
        base = BaseModel(trial.model)
        network = base.network
    parts = read_parts(network, lora_file)
    grid_file = folder.with_name(f"{folder.name}.png")
    if trial.picture is not None or trial.instruction:
        request = _request(trial, shot, lora_file)
        drawn = sample_edit(request, observer)
        _save(request, drawn, folder, grid_file)
        return Tried(grid_file, folder, step, None)
    assert shot is not None
    config, encoded = trial.run.config, trial.run.encoded
    device = pick_device(trial.model.device)
    few_step = config.validation.validation_lora
    few_step_lora = read_second_lora(network, Path(few_step)) if few_step else None
    validator = Validator(encoded, base, config.validation, [shot], few_step_lora)
    transformer = load_with_lora(base, device, parts, trial.strength, encoded.preprocessing, observer, config)
    report = validator.sample(
        transformer,
        device,
        {AVERAGE if lora_file.stem.endswith("ema") else TRAINED: nullcontext},
        step=step,
        grid_file=grid_file,
        base_folder=trial.run.folder.base_pictures,
        observer=observer,
    )
    del transformer
    release_memory()
    return Tried(grid_file, folder, step, report)


@contextmanager
def _model_explained(run: TriedRun) -> Iterator[None]:
    try:
        yield
    except ModelFileError as error:
        name = run.folder.path.name
        raise ModelFileError(f"The model that the run {name!r} was trained with can't be used now. {error}") from error


def _shot(trial: Trial) -> Shot | None:
    """The pair to draw, or whose settings apply. None if a picture and an instruction replace it."""
    shots, name = trial.run.shots, trial.run.folder.path.name
    if 1 <= trial.pair <= len(shots):
        return shots[trial.pair - 1]
    if trial.picture is not None and trial.instruction:
        return None
    if not shots:
        raise ConfigError(f"The run {name!r} has no held-out pairs. Choose a picture and write an instruction.")
    raise ConfigError(f"pair is {trial.pair}, but the run {name!r} has the held-out pairs 1 to {len(shots)}.")


def _request(trial: Trial, shot: Shot | None, lora_file: Path) -> SampleRequest:
    """The edit of another picture, or by another instruction, at the size of the run's pairs."""
    config, encoded = trial.run.config, trial.run.encoded
    entry = shot.entry if shot else encoded.pairs[0]
    own = own_size(entry)
    side = max(64, round(math.sqrt(own.width * own.height) / _STEP_OF_RESOLUTION) * _STEP_OF_RESOLUTION)
    if trial.picture is not None:
        references, size = (trial.picture,), bucket_size(Size(*trial.picture.size), side)
    else:
        _, *pictures = encoded.load_pictures(entry)
        references, size = tuple(to_picture(each.float() / 255) for each in pictures), own
    return SampleRequest(
        model=trial.model,
        references=references,
        prompt=trial.instruction or (shot.caption if shot else ""),
        preprocessing=encoded.preprocessing,
        match_target_res=_follow_target(entry),
        lora_file=lora_file,
        lora_strength=trial.strength,
        size=size,
        resolution=side,
        sampling=config.validation,
        seed=config.validation.validation_seed,
        memory_of=config,
    )


def _follow_target(entry: EncodedEntry) -> bool:
    """Whether the pair's references were scaled to the size of its target, and not to about a megapixel."""
    return all(tuple(shape[1:]) == tuple(entry.shape[1:]) for shape in entry.reference_shapes)


def _save(request: SampleRequest, drawn: Image.Image, folder: Path, grid_file: Path) -> None:
    row = GridRow(references=request.references, base=None, lora=drawn, target=None, caption=request.prompt)
    save_sample_pictures([row], folder)
    save_picture(validation_grid([row]), grid_file)
