"""Registers the nodes and the HTTP routes with ComfyUI."""

from __future__ import annotations

import functools
from typing import Any

from comfy_api.latest import ComfyExtension, io

from . import (
    check,
    choose_model,
    dataset,
    draft_captions,
    edit_pairs,
    edit_weight,
    encode,
    graph_pairs,
    host_server,
    import_simpletuner,
    memory_plan,
    mix,
    model,
    model_lora,
    raw_values,
    reference_settings,
    refused,
    result,
    routes,
    sample,
    settings,
    short_train,
    size_settings,
    train,
    try_lora,
    whole_report,
)
from .schema import ID_PREFIX

NODES: list[type[io.ComfyNode]] = [
    model.LoadModel,
    model.LoadModelFiles,
    dataset.PairFolders,
    dataset.CaptionSettings,
    graph_pairs.PairImages,
    dataset.PreviewPairs,
    check.CheckPairs,
    size_settings.SizeSettings,
    reference_settings.ReferenceSettings,
    encode.EncodePairs,
    mix.MixPairs,
    import_simpletuner.ImportSimpleTuner,
    import_simpletuner.EncodeImported,
    edit_weight.PreviewEditWeight,
    *settings.NODES,
    memory_plan.PlanMemory,
    train.TrainLora,
    sample.SampleEdit,
    try_lora.TryLora,
    result.ApplyLora,
    result.PlotLoss,
    choose_model.ChooseModel,
    model_lora.AddModelLora,
    edit_pairs.EditPairs,
    short_train.Train,
    short_train.MoreSettings,
    draft_captions.DraftCaptions,
]


@functools.cache
def _by_id() -> dict[str, type[io.ComfyNode]]:
    return {node.define_schema().node_id: node for node in NODES}


def _refusals(request: dict[str, Any]) -> dict[str, str]:
    raw_values.refuse_wrong_types(request.get("prompt"), _by_id())
    return whole_report.refusals(request)


routes.register_routes()
host_server.before_queueing(ID_PREFIX, _refusals, refused.noted)
host_server.before_validation(lambda request: raw_values.refuse_wrong_types(request.get("prompt"), _by_id()))
refused.look_for_others(whole_report.other_problems)


class QwenEditTrainer(ComfyExtension):
    """The extension with all nodes of this pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The nodes. ComfyUI calls this once."""
        return NODES
