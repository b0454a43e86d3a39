"""Inside ComfyUI: calls every node with hostile values in each of its inputs, as ComfyUI calls it.

Answer: per "node.input", the hostile values by what became of them, and how the light nodes' executions ended.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACK = "qwen_edit_pack"
# Nodes that compute nothing. They are executed with the values that their inputs accept.
LIGHT = {"PairFolders", "PairImages", "ImportSimpleTuner", "LoadModel", "LoadModelFiles", "PlotLoss", "PreviewPairs"}

LOSSES = {
    "good": [0.5, 1, 0.25],
    "text": "0.5",
    "texts": ["0.5"],
    "nothing": None,
    "nested": [[0.5]],
    "NaN": [float("nan")],
    "huge": [10**400],
}


class Accepted(Exception):  # noqa: N818 - no error
    """Raised in place of a node's work when its inputs were accepted."""


def main(_tensors: dict[str, Tensor], values: dict[str, Any]) -> tuple[dict[str, Tensor], Any]:
    """Call the nodes; returns what became of each value."""
    import folder_paths
    import utils.extra_config  # noqa: F401 - imported before another package named utils

    for name, choose in (("output", folder_paths.set_output_directory), ("input", folder_paths.set_input_directory)):
        (Path.cwd() / name).mkdir()
        choose(str(Path.cwd() / name))
    hostile = hostile_values(values["hostile"])
    parent = types.ModuleType(PACK)
    parent.__path__ = [values["repo"]]
    sys.modules[PACK] = parent
    nodes = importlib.import_module(f"{PACK}.nodes.extension").NODES
    schema = importlib.import_module(f"{PACK}.nodes.schema")
    sockets = importlib.import_module(f"{PACK}.nodes.sockets")
    errors = importlib.import_module(f"{PACK}.trainer_core.errors")
    check = schema.checked_inputs

    def only_check(*arguments: Any, **keywords: Any) -> Any:
        raise Accepted(check(*arguments, **keywords))

    result: dict[str, Any] = {"bases": [issubclass(node, schema.Node) for node in nodes], "door": {}, "executed": {}}
    result["validated"] = {}
    for node in nodes:
        right, listed = right_values(node, sockets), node.define_schema().is_input_list
        validated = inspect.signature(node.validate_inputs).parameters if "validate_inputs" in node.__dict__ else ()
        for each in node.define_schema().inputs:
            for name, value in hostile.items():
                key = f"{node.__name__}.{each.id}"
                given = {**right, each.id: [value] if listed else value}
                schema.checked_inputs = only_check
                found = outcome(node, "execute", given, errors)
                result["door"].setdefault(key, {})[name] = found
                schema.checked_inputs = check
                if found == "accepted" and (node.__name__ in LIGHT or node.__name__.endswith("Settings")):
                    result["executed"][f"{key}: {name}"] = outcome(node, "execute", given, errors)
                if each.id in validated:
                    result["validated"][f"{key}: {name}"] = outcome(node, "validate_inputs", {each.id: value}, errors)
    plot = next(node for node in nodes if node.__name__ == "PlotLoss")
    losses = {name: {"loss": value} for name, value in LOSSES.items()}
    result["losses"] = {name: outcome(plot, "execute", {"loss_map": value}, errors) for name, value in losses.items()}
    pair_images = next(node for node in nodes if node.__name__ == "PairImages")
    half = {**right_values(pair_images, sockets), "reference_2": [torch.zeros(1, 64, 64, 3), None]}
    result["half a list"] = {
        name: outcome(pair_images, "execute", {**half, "reference_2": order}, errors)
        for name, order in (("last", half["reference_2"]), ("first", half["reference_2"][::-1]))
    }
    result["wrong twice"] = wrong_twice(nodes, right_values, sockets, errors)
    result["classes"] = {
        each.get_io_type(): sockets.value_class(each.get_io_type()) is not None
        for node in nodes
        for each in node.define_schema().inputs
        if each.get_io_type().startswith("QWEN_EDIT")
    }
    return {"nothing": torch.zeros(1)}, result


def wrong_twice(nodes: list[Any], right: Callable[..., Any], sockets: Any, errors: Any) -> str:
    """The message for two wrong inputs of a node."""
    node = next(node for node in nodes if node.__name__ == "SampleEdit")
    return outcome(node, "execute", {**right(node, sockets), "seed": None, "guidance": "4"}, errors)


def hostile_values(file: str) -> dict[str, Any]:
    """HOSTILE of tests/support/hostile_values.py, with two values that only other nodes can hand on."""
    spec = importlib.util.spec_from_file_location("hostile_values", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {**module.HOSTILE, "flat tensor": torch.zeros(3), "no pictures": torch.zeros(0, 8, 8, 3)}


def right_values(node: Any, sockets: Any) -> dict[str, Any]:
    """A value of the right type for every required input of the node."""
    schema = node.define_schema()
    values = {each.id: right_value(each, sockets) for each in schema.inputs if not each.optional}
    return {key: [value] for key, value in values.items()} if schema.is_input_list else values


def right_value(each: Any, sockets: Any) -> Any:
    kind = each.get_io_type()
    if kind == "COMBO":
        return each.default or each.options[0]
    if kind in ("BOOLEAN", "INT", "FLOAT", "STRING"):
        return each.default
    if kind == "IMAGE":
        return torch.zeros(1, 64, 64, 3)
    wanted = sockets.value_class(kind)
    if wanted is None:
        return object()
    if kind == "QWEN_EDIT_DATASET":
        return wanted((), "", Path("a"), (Path("b"),))
    try:
        return wanted()
    except TypeError:
        return object.__new__(wanted)


def outcome(node: Any, method: str, given: dict[str, Any], errors: Any) -> str:
    """What ComfyUI's call of the node ends with: "accepted", or the error."""
    function = "EXECUTE_NORMALIZED" if method == "execute" else method
    clone = node.PREPARE_CLASS_CLONE({})
    try:
        answer = getattr(node, function).__func__(clone, **given)
    except Accepted:
        return "accepted"
    except errors.TrainerError as error:
        str(error).encode()
        return f"{type(error).__name__}: {error}"
    except Exception as error:  # noqa: BLE001 - the fault that the test looks for
        return f"FAULT {type(error).__name__}: {str(error)[:200]} {traceback.format_exc()[-600:]}"
    return f"returned {type(answer).__name__}: {answer}" if isinstance(answer, str | bool) else "returned a result"
