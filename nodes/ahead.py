"""Refuses a training before the graph runs, or before its pairs are encoded, if training would refuse it.

ComfyUI executes a graph node by node, and the training comes last, after hours of encoding. But what its settings nodes
will output follows from their widgets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ..trainer_core.errors import Problems, SettingsError, TrainerError
from . import choose_model, host_server, model, model_lora, reference_settings, settings, short_train, size_settings
from .composed import AUTOMATIC, UNKNOWN_MODEL, compose
from .graph_values import GraphValues, Link, UnknownError
from .raw_values import entries, is_link
from .run_names import continues_kept, settled
from .schema import ID_PREFIX
from .train import TrainLora, run_config
from .training import ADVANCED, SHORT

if TYPE_CHECKING:
    from ..trainer_core.conditioning.encoded import EncodedDataset
    from ..trainer_core.conditioning.encoding_plan import PlannedDataset

_MIX = "QwenEdit_MixPairs"
LATER = ("model", "encoded", "validation_encoded")  # inputs of a training that are known when its pairs are encoded
_MODELS = (choose_model.ChooseModel, model.LoadModel, model.LoadModelFiles, model_lora.AddModelLora)
_MORE = (short_train.MoreSettings, size_settings.SizeSettings, reference_settings.ReferenceSettings)
FROM_WIDGETS = {f"{ID_PREFIX}{node.__name__}": node for node in (*settings.NODES, *_MODELS, *_MORE)}


def refused_at_once(prompt: Any) -> dict[str, TrainerError]:
    """What is wrong with the settings of each training and with each chosen model in a prompt, by node id."""
    found: dict[str, TrainerError] = {}
    values = GraphValues(prompt, FROM_WIDGETS)
    for node_id, kind, _ in entries(prompt):
        problems = Problems()
        try:
            if kind == ADVANCED:
                run_config(problems, UNKNOWN_MODEL, None, **values.inputs(TrainLora, node_id, without=LATER))
            elif kind == SHORT:
                _check_short(problems, values, node_id)
            elif FROM_WIDGETS.get(kind) in _MODELS:
                values.output([node_id, 0])
            problems.raise_all(SettingsError)
        except TrainerError as error:
            found[node_id] = error
        except UnknownError:
            continue
    return found


def _check_short(problems: Problems, values: GraphValues, node_id: str) -> None:
    """Check the settings of a training of the short path. What is wrong with its model is told at the model node."""
    given = values.inputs(short_train.Train, node_id, without=("model", "dataset"))
    try:
        chosen = values.output(values.given(node_id).get("model"))
    except TrainerError:
        chosen = UNKNOWN_MODEL
    except UnknownError:
        if given.get("preset") == AUTOMATIC:  # it may be the demo model, which has another preset
            raise
        chosen = UNKNOWN_MODEL
    compose(problems, chosen, **short_train.chosen(given))


def check_trainings(
    hidden: Any,
    known: Mapping[Link, Any],
    parts: Sequence[PlannedDataset],
    outputs: Sequence[EncodedDataset | None],
) -> None:
    """Check what the trainings in the graph would refuse after `parts` are encoded for them.

    Args:
        hidden: the encoding node's hidden inputs, with its `unique_id` and the `prompt`.
        known: values that other nodes have output.
        outputs: what the encoding node will output, by the number of the output.

    Raises:
        TrainerError: see `run_config` and `check_before_encoding`.
    """
    from ..trainer_core.planning.start import RunData, check_before_encoding

    problems, prompt = Problems(), hidden.prompt or {}
    values, asked_for = GraphValues(prompt, FROM_WIDGETS, known), host_server.asked_for(prompt)
    for node_id, kind, inputs in entries(prompt):
        is_next = kind == ADVANCED and _leads_to(prompt, inputs.get("encoded"), hidden.unique_id)
        if not is_next or node_id not in asked_for:
            continue
        try:
            given = values.inputs(TrainLora, node_id, without=LATER)
            config = run_config(problems, values.output(inputs.get("model")), None, **given)
        except UnknownError:
            continue
        if config is None:
            continue
        links = [inputs[name] for name in ("encoded", "validation_encoded") if inputs.get(name) is not None]
        is_all = all(link[0] == hidden.unique_id for link in links)
        encoded, held_out = [*(outputs[link[1]] for link in links), None][:2] if is_all else (None, None)
        data = RunData(trained=parts, every=parts, encoded=encoded, held_out=held_out)
        config, _ = settled(config, encoded, given["if_run_exists"])
        continue_kept = continues_kept(given["if_run_exists"])
        problems.attempt(partial(check_before_encoding, config, data, continue_kept=continue_kept))
    problems.raise_all()


def known_values(hidden: Any, values: Mapping[str, Any]) -> dict[Link, Any]:
    """The values that a node was given for these inputs, by the links through which they came."""
    inputs = next((given for name, _, given in entries(hidden.prompt) if name == hidden.unique_id), {})
    return {(*inputs[name],): value for name, value in values.items() if is_link(inputs.get(name))}


def _leads_to(prompt: Any, link: Any, node_id: str) -> bool:
    """Whether the pairs of an encoding node are trained through this link, directly or as a part of mixes."""
    waiting, seen = [link], set[str]()
    while waiting:
        link = waiting.pop()
        if not is_link(link) or link[0] in seen:
            continue
        if link[0] == node_id:
            return True
        seen.add(link[0])
        inputs = next((given for name, kind, given in entries(prompt) if (name, kind) == (link[0], _MIX)), {})
        parts = (name.removeprefix("encoded_") for name in inputs if name.startswith("encoded_"))
        waiting += [inputs[f"encoded_{part}"] for part in parts if inputs.get(f"probability_{part}", 1) != 0]
    return False
