"""What a training in a graph will do, found without running the graph: problems, warnings, time, memory and disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from ..trainer_core.config import PairCheckConfig, TrainConfig, to_json
from ..trainer_core.disk import disk_errors, existing_folder, free_disk_bytes
from ..trainer_core.errors import Interrupted, OutOfMemoryError, Problems, TrainerError, split
from ..trainer_core.events import Observer
from ..trainer_core.qwen_image.flavours import title_of
from ..trainer_core.text import some_of
from . import check, dataset, edit_pairs, encode, host_folders, host_server, import_simpletuner, mix
from .ahead import FROM_WIDGETS, LATER
from .composed import AUTOMATIC, UNKNOWN_MODEL, compose
from .door import PLAIN
from .graph_values import ForeseenPairs, GraphValues, UnknownError, not_connected
from .overrides import SETTINGS_NODES, Override, compared
from .raw_values import inputs_of, is_link
from .refused import for_page
from .run_names import continues_kept, settled
from .schema import ID_PREFIX
from .short_train import Train, chosen, planned_pairs
from .sockets import AutomaticModel
from .train import TrainLora, run_config
from .train_config import NO_PRESET
from .training import SHORT

if TYPE_CHECKING:
    from ..trainer_core.planning.start import CheckedRun, RunData

T = TypeVar("T")

_FORESEEN = (
    *(dataset.PairFolders, edit_pairs.EditPairs, check.CheckPairs, encode.EncodePairs, mix.MixPairs),
    *(import_simpletuner.ImportSimpleTuner, import_simpletuner.EncodeImported),
)
NODES = {**FROM_WIDGETS, **{f"{ID_PREFIX}{node.__name__}": node for node in _FORESEEN}}
"""The nodes before a training whose outputs can be known before the graph runs, by type."""
_FINDINGS = {
    "shift": "the reference is shifted against the target, and the LoRA would learn to move the picture",
    "zoom": "reference and target differ in scale",
    "colour": "reference and target differ in colour outside the edit",
    "size": "reference and target differ in size, so one of them is less sharp",
    "framing": "reference and target are framed differently",
    "unmeasured": "reference and target are too different to be compared",
    "equal": "reference and target hardly differ",
    "duplicate": "nearly the same as another pair",
    "caption": "the caption says little, or occurs twice",
}


@dataclass(slots=True)
class Found:
    """What was found. `problems` have the id of the node to which they belong. `notes` are no reason to worry."""

    values: GraphValues
    problems: list[tuple[str, TrainerError]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def attempt(self, node_id: str, what: str, find: Callable[[], T]) -> T | None:
        """The result of `find`, or None if there is a problem or `what` isn't known before the graph runs."""
        try:
            with disk_errors(host_folders.cache_dir()):
                return find()
        except Interrupted:
            raise
        except TrainerError as error:
            if not any(error is each for each in self.values.refused.values()):
                self.add(node_id, error)
        except UnknownError:
            if not self.values.refused:
                self.warnings.append(
                    f"{what} can't be known before the graph runs, because a node of another pack takes part. So some "
                    "checks are left to the run."
                )
        return None

    def through(self, node_id: str, name: str, what: str) -> Any:
        """What comes through a link of a node; None if there is no link, or as `attempt`."""
        link = self.values.given(node_id).get(name)
        return self.attempt(node_id, what, lambda: self.values.output(link)) if is_link(link) else None

    def need_links(self, node: Any, node_id: str) -> None:
        """Add a problem for each required socket of a node that nothing is connected to."""
        given = self.values.given(node_id)
        for each in inputs_of(node):
            if not each.optional and each.get_io_type() not in (*PLAIN, "COMBO") and not is_link(given.get(each.id)):
                self.add(node_id, not_connected(each))

    def add_all(self, node_id: str, problems: Problems) -> None:
        """Add all of these problems."""
        for error in problems.errors:
            self.add(node_id, error)

    def add(self, node_id: str, error: TrainerError) -> None:
        """Add the problems in an error. Memory that is short only now is a warning."""
        for each in split(error):
            if isinstance(each, OutOfMemoryError) and host_server.is_busy():
                self.warnings.append(f"{each} Another job is running now. When it has ended, more memory may be free.")
            else:
                self.problems.append((node_id, each))


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """A training as far as it is known. `preset` is empty without one, and `why` says why it is this one."""

    config: TrainConfig | None
    is_model_known: bool
    data: RunData | None
    is_cache_known: bool = True
    continue_kept: bool = False
    preset: str = ""
    why: str = ""
    held: Mapping[str, Any] = field(default_factory=dict)
    overridden: Sequence[Override] = ()


def before_start(prompt: Any, node_id: str, observer: Observer, *, measure_pairs: bool) -> dict[str, Any]:
    """The answer for one training node of a prompt. Nothing is loaded, and only results of picture checks are written.

    Args:
        prompt: a prompt as the page sends it. It may be anything.
        node_id: of a training node in it.
        observer: can stop the search.
        measure_pairs: also measures the pictures of each pair.

    Raises:
        Interrupted: the observer asked to stop.
    """
    found, training, run = _looked_at(prompt, node_id, observer)
    if training.data is not None:
        _describe_pairs(found, training, training.data, observer, measure_pairs=measure_pairs)
    if training.config is not None and training.is_model_known:
        _describe_run(found, training.config, training.data, run)
    return {
        "problems": [{"node_id": source, "text": for_page(error)} for source, error in _distinct(found.problems)],
        "warnings": [for_page(text) for text in dict.fromkeys(found.warnings)],
        "notes": [for_page(text) for text in dict.fromkeys(found.notes)],
        "facts": [{"name": name, "value": value} for name, value in found.facts.items()],
        "preset": {"name": training.preset, "why": training.why, "values": dict(training.held)},
        "overridden": [
            {"setting": each.setting, "preset": each.preset_value, "value": each.value, "by": each.by}
            for each in training.overridden
        ],
    }


def problems_before(prompt: Any, node_id: str, observer: Observer) -> list[tuple[str, TrainerError]]:
    """What `before_start` finds wrong: each problem once, with the id of the node that has it.

    Raises:
        Interrupted: the observer asked to stop.
    """
    return list(_distinct(_looked_at(prompt, node_id, observer)[0].problems))


def _looked_at(prompt: Any, node_id: str, observer: Observer) -> tuple[Found, Training, CheckedRun | None]:
    """The training with all its problems, and its run as far as it could be checked."""
    values = GraphValues(prompt, NODES, observer=observer)
    found = Found(values)
    training = (_short_training if values.kind_of(node_id) == SHORT else _advanced_training)(found, node_id)
    found.problems[:0] = [(source, error) for source, error in values.refused.items()]
    run = _checked(found, node_id, training, training.config) if training.config and training.is_model_known else None
    return found, training, run


def _distinct(problems: Sequence[tuple[str, TrainerError]]) -> Iterator[tuple[str, TrainerError]]:
    """Each problem once, at the first node that has it."""
    seen: set[str] = set()
    for node_id, error in problems:
        if str(error) not in seen:
            seen.add(str(error))
            yield node_id, error


def _advanced_training(found: Found, node_id: str) -> Training:
    """The training of a node that gets encoded pairs."""
    from ..trainer_core.planning.start import RunData

    values, problems = found.values, Problems()
    found.need_links(TrainLora, node_id)
    model, encoded = found.through(node_id, "model", "The model"), found.through(node_id, "encoded", "The pairs")
    held_out = found.through(node_id, "validation_encoded", "The pairs to validate")
    settings = found.attempt(node_id, "The settings", lambda: values.inputs(TrainLora, node_id, without=LATER))
    config = None
    if settings is not None:
        config = run_config(problems, model or UNKNOWN_MODEL, None, **settings)
    found.add_all(node_id, problems)
    data = None
    if isinstance(encoded, ForeseenPairs):
        others = held_out.every if isinstance(held_out, ForeseenPairs) else ()
        every = list({id(each): each for each in (*encoded.every, *others)}.values())
        held = held_out.encoded if isinstance(held_out, ForeseenPairs) else None
        data = RunData(trained=encoded.trained, every=every, encoded=encoded.encoded, held_out=held)
    if config is not None and data is not None:
        config = _settled(found, node_id, config, data, (settings or {}).get("if_run_exists", ""))
    preset = str((settings or {}).get("preset", NO_PRESET))
    chosen: dict[str, Any] = {}
    if config is not None and preset != NO_PRESET:
        link = values.given(node_id).get("model")
        by = NODES.get(values.kind_of(link[0])) if link and is_link(link) else None
        chosen = {"preset": preset, "why": f"Preset {preset}, as chosen.", **_compared(preset, config, data, by)}
    return Training(
        config=config,
        is_model_known=model is not None,
        data=data,
        is_cache_known=isinstance(encoded, ForeseenPairs) and encoded.is_cache_known,
        continue_kept=continues_kept((settings or {}).get("if_run_exists", "")),
        **chosen,
    )


def _short_training(found: Found, node_id: str) -> Training:
    """The training of a node that encodes its pairs itself."""
    from ..trainer_core.planning.start import RunData
    from .host_encoders import foreseen_encoders

    values, problems = found.values, Problems()
    found.need_links(Train, node_id)
    model, pairs = found.through(node_id, "model", "The model"), found.through(node_id, "dataset", "The pairs")
    more = found.through(node_id, "more_settings", "More settings")
    links = ("model", "dataset", "more_settings")
    widgets = found.attempt(node_id, "The settings", lambda: values.inputs(Train, node_id, without=links))
    nothing = Training(config=None, is_model_known=False, data=None)
    if widgets is None or (more is None and is_link(values.given(node_id).get("more_settings"))):
        return nothing
    given = chosen(widgets)
    if model is None and not values.refused and given["preset"] == AUTOMATIC:  # it may be the demo model
        return nothing
    base = model or UNKNOWN_MODEL
    composed = found.attempt(node_id, "", lambda: compose(problems, base, more_settings=more, **given))
    found.add_all(node_id, problems)
    if composed is None or model is None:
        return nothing
    config, data = composed.config, None
    encoders = foreseen_encoders(["clip"]) if more and more.clip is not None else None
    if pairs is not None:
        plan = partial(planned_pairs, composed, pairs, more, values.observer, encoders)
        if planned := found.attempt(node_id, "", plan):
            data = RunData(trained=[planned], every=[planned], encoded=planned.encoded())
            config = _settled(found, node_id, config, data, given["if_run_exists"])
    return Training(
        config=config,
        is_model_known=True,
        data=data,
        is_cache_known=encoders is None,
        continue_kept=continues_kept(given["if_run_exists"]),
        preset=composed.preset,
        why=composed.why,
        held=composed.from_preset,
        overridden=composed.overridden,
    )


def _settled(found: Found, node_id: str, config: TrainConfig, data: RunData, if_run_exists: str) -> TrainConfig:
    """The configuration with the run folder that the training will use. A warning says if the name is another one."""
    named = found.attempt(node_id, "", lambda: settled(config, data.encoded, if_run_exists))
    found.warnings += filter(None, [named[1] if named else ""])
    return named[0] if named else config


def _compared(preset: str, config: TrainConfig, data: RunData | None, model_node: Any) -> dict[str, Any]:
    """What the preset sets, and what other nodes override. `model_node`: the node that chooses the model, if known."""
    settings, set_by = to_json(config), dict(SETTINGS_NODES)
    if model_node is None or isinstance(config.model, AutomaticModel):  # nobody has set the precision
        del settings["model"]
    else:
        set_by["model"] = model_node.define_schema().display_name
    set_by["max_train_steps"] = TrainLora.define_schema().display_name
    if data is not None:
        settings["encoding"] = to_json(data.every[0].encoding)
        set_by["encoding"] = encode.EncodePairs.define_schema().display_name
    held, overridden = compared(preset, settings, set_by)
    return {"held": held, "overridden": overridden}


def _checked(found: Found, node_id: str, training: Training, config: TrainConfig) -> CheckedRun | None:
    """Add the problems of the run. None if its pairs are not known."""
    from ..trainer_core.planning.preparation import check_training
    from ..trainer_core.planning.start import check_run
    from ..trainer_core.qwen_image.base_model import BaseModel

    if training.data is None:
        found.attempt(node_id, "", lambda: check_training(config, BaseModel(config.model)))
        return None
    problems = Problems()
    run = check_run(problems, config, training.data, continue_kept=training.continue_kept, held_leaves=True)
    found.add_all(node_id, problems)
    return run


def _describe_run(found: Found, config: TrainConfig, data: RunData | None, run: CheckedRun | None) -> None:
    """Add facts and warnings about the run."""
    facts = found.facts
    facts |= {
        "model": title_of(config.model.flavour),
        "precision": config.model.base_model_precision,
        "rank": config.lora.lora_rank,
        "steps": config.max_train_steps,
    }
    if data is None or run is None:
        return
    found.warnings += run.notes
    facts["finished"] = run.is_finished
    if run.disk:
        facts["disk_needed"] = sum(use.size for use in run.disk)
        facts["disk_free"] = min(free_disk_bytes(existing_folder(use.folder)) for use in run.disk)
    if run.model is not None and not run.is_finished and any(part.pairs for part in data.trained):
        _add_outlook(found, config, data, run)


def _add_outlook(found: Found, config: TrainConfig, data: RunData, run: CheckedRun) -> None:
    """Add the memory and the time that the run needs."""
    from ..trainer_core.device import pick_device
    from ..trainer_core.planning.choose import budget_of
    from ..trainer_core.planning.report import unused_in_words, verdict
    from ..trainer_core.planning.start import foreseen_plan, outlook, steps_done
    from ..trainer_core.planning.workload import workload_of_pairs
    from .card_speed import known_speed

    assert run.model is not None
    facts, device, size = found.facts, pick_device(config.model.device), run.model.size
    work = workload_of_pairs(data.every, config.batching, config.validation)
    budget = budget_of(device, config.memory.vram_gib, held_leaves=True)
    facts |= {"done": steps_done(config), "is_measurable": device.type == "cuda"}
    found.warnings += filter(None, [unused_in_words(config)])
    try:
        plan = foreseen_plan(config, size, work, budget)
    except OutOfMemoryError as error:  # `check_run` has it already, unless only the estimated prompts are too long
        if not any(isinstance(each, OutOfMemoryError) for _, each in found.problems):
            found.warnings.append(str(error))
        return
    ahead = outlook(plan, known_speed(plan.config, size, work, device), done=facts["done"])
    facts |= {"time": ahead.seconds, "first_pictures": ahead.first_pictures, "memory_is_shared": budget.is_shared}
    facts |= {"ram_needed": plan.host_peak_bytes, "ram_free": budget.host_bytes}
    if budget.is_shared:
        facts["ram_needed"] += plan.needed_device_bytes
    else:
        facts |= {"vram_needed": plan.needed_device_bytes, "vram_free": budget.device_bytes}
    if not budget.holds(plan):
        found.warnings.append(verdict(plan, budget))


def _describe_pairs(
    found: Found, training: Training, data: RunData, observer: Observer, *, measure_pairs: bool
) -> None:
    """Add facts and warnings about the pairs."""
    from ..trainer_core.planning.start import pairs_to_encode

    facts = found.facts
    if data.encoded is not None:
        facts["pairs"] = len(data.encoded.pairs)
        facts["held_out"] = len((data.held_out or data.encoded).validation_pairs)
    facts["resolution"] = max(part.encoding.resolution for part in data.every)
    facts["to_encode"] = pairs_to_encode(data.every) if training.is_cache_known else None
    datasets = {part.dataset.fingerprint: part.dataset for part in data.every}
    for pairs in datasets.values():
        found.warnings += pairs.notes
    if measure_pairs:
        for pairs in datasets.values():
            found.attempt("", "", lambda pairs=pairs: _measure(found, pairs, observer))


def _measure(found: Found, pairs: Any, observer: Observer) -> None:
    """Add what the pair check finds: a warning for each kind of finding, and its notes."""
    from ..trainer_core.data.pair_check import check_pairs

    check = check_pairs(pairs, PairCheckConfig(), observer, checked_dir=host_folders.checked_dir())
    found.notes += check.notes
    by_kind: dict[str, dict[str, None]] = {}
    for each in check.findings:
        by_kind.setdefault(each.kind, {})[each.key] = None
    found.warnings += [
        f"{len(keys)} of {len(pairs.pairs)} pairs: {_FINDINGS[kind]} ({some_of(list(keys))})."
        for kind, keys in by_kind.items()
    ]
