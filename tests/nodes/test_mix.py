"""In a real ComfyUI, one dataset is mixed at two resolutions. One of its targets has no reference."""

from __future__ import annotations

import json
from typing import Any

from tests.support.comfyui_server import PackServer
from tests.support.narrow import make_pairs


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def test_one_dataset_at_two_resolutions(comfyui: PackServer):
    config = make_pairs(comfyui.input / "mixed", 3)
    (comfyui.input / "mixed" / "reference_1" / "001.png").unlink()
    assert config.target_dir.endswith("mixed/target")
    folders = {"target_folder": "mixed/target", "reference_folder_1": "mixed/reference_1"}
    encoding = {"model": ["1", 0], "dataset": ["2", 0], "preprocessing": "comfyui", "match_target_res": True}
    encoding |= {"num_eval_images": 0, "validation_negative_prompt": " ", "seed": 0}
    settings = {"caption_strategy": "textfile", "instance_prompt": "", "references_optional": True}
    parts = {"encoded_1": ["3", 0], "repeats_1": 2, "probability_1": 1.0, "encoded_2": ["4", 0], "probability_2": 0.5}
    answer = comfyui.run(
        {
            "1": node("QwenEdit_LoadModel", **MODEL),
            "2": node("QwenEdit_PairFolders", **folders, **settings),
            "3": node("QwenEdit_EncodePairs", resolution=96, **encoding),
            "4": node("QwenEdit_EncodePairs", resolution=128, **encoding),
            "5": node("QwenEdit_MixPairs", **parts),
            "6": node("QwenEdit_PreviewEditWeight", encoded=["5", 0], edit_weight=0.5, max_pairs=6),
        }
    )
    assert answer["6"]["images"]
    (manifest,) = (
        values
        for path in (comfyui.output / "qwen_edit_trainer" / "cache" / "datasets").glob("*.json")
        if len((values := json.loads(path.read_text()))["pairs"]) == 6
    )
    seen = [(pair["key"], pair.get("repeats", 0), pair.get("probability", 1.0)) for pair in manifest["pairs"]]
    names = ("000", "001", "002")
    assert seen == [*((f"1/{name}", 2, 1.0) for name in names), *((f"2/{name}", 0, 0.5) for name in names)]
    assert [len(pair["references"]) for pair in manifest["pairs"]] == [1, 0, 1, 1, 0, 1]


MODEL = {
    "base_model": "demo (embedded)",
    "flavour": "edit-v1",
    "base_model_precision": "none",
    "quantize_via": "accelerator",
}
MODEL |= {"mixed_precision": "no", "device": "cpu"}
