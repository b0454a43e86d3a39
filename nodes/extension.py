"""Registers the nodes and the HTTP routes with ComfyUI."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import (
    check,
    dataset,
    edit_weight,
    encode,
    graph_pairs,
    import_simpletuner,
    memory_plan,
    mix,
    model,
    reference_settings,
    result,
    routes,
    sample,
    settings,
    train,
)

NODES: list[type[io.ComfyNode]] = [
    model.LoadModel,
    model.LoadModelFiles,
    dataset.PairFolders,
    dataset.CaptionSettings,
    graph_pairs.PairImages,
    dataset.PreviewPairs,
    check.CheckPairs,
    encode.SizeSettings,
    reference_settings.ReferenceSettings,
    encode.EncodePairs,
    mix.MixPairs,
    import_simpletuner.ImportSimpleTuner,
    import_simpletuner.EncodeImported,
    edit_weight.PreviewEditWeight,
    settings.LoraSettings,
    settings.OptimizerSettings,
    settings.TrainingSettings,
    settings.RolloutSettings,
    settings.ValidationSettings,
    settings.MemorySettings,
    memory_plan.PlanMemory,
    settings.EmaSettings,
    train.TrainLora,
    sample.SampleEdit,
    result.ApplyLora,
    result.PlotLoss,
]

routes.register_routes()


class QwenEditTrainer(ComfyExtension):
    """The extension with all nodes of this pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The nodes. ComfyUI calls this once."""
        return NODES
