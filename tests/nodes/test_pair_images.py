"""From pictures of the graph and from folders to checked and previewed pairs, in a real ComfyUI."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from PIL import Image

from tests.support.comfyui_server import PackServer


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def text_of(answer: dict[str, Any], node_id: str) -> str:
    return answer[node_id]["text"][0]


def test_batches_become_pairs_that_can_be_checked(comfyui: PackServer):
    prompt = {
        "1": node("EmptyImage", width=64, height=48, batch_size=3, color=0x203040),
        "2": node("EmptyImage", width=64, height=48, batch_size=3, color=0xA0B0C0),
        "3": node("QwenEdit_PairImages", target=["1", 0], reference_1=["2", 0], captions="make the picture dark"),
        "4": node("QwenEdit_CheckPairs", dataset=["3", 0], **CHECK),
        "5": node("QwenEdit_PreviewPairs", dataset=["4", 0], max_pairs=2),
    }
    answer = comfyui.run(prompt)
    assert text_of(answer, "5").startswith("3 pairs with 1 reference each.")
    assert "Pair check: 3 of 3 pairs are worth a look: 3 not measurable" in text_of(answer, "4")
    (folder,) = (comfyui.output / "qwen_edit_trainer" / "graph_pairs").iterdir()
    assert len(list(folder.rglob("*.png"))) == 6 and len(list(folder.rglob("*.txt"))) == 3


CHECK = {"max_shift": 0.75, "max_zoom_percent": 0.3, "max_colour_offset": 3.0, "min_difference": 6.0}
CHECK |= {"duplicate_bits": 6, "check_side": 512, "max_pairs": 2}


def test_a_table_of_captions_and_masks_through_the_nodes(comfyui: PackServer):
    root = comfyui.input / "tables"
    for part, value in (("target", 40), ("reference", 90), ("mask", 255)):
        (root / part).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((48, 64, 3), value, np.uint8)).save(root / part / "a.png")
    row = {"filename": "a.png", "caption": ["make it dark", "darken the picture"]}
    (root / "target" / "captions.jsonl").write_text(json.dumps(row))
    words = {"disable_multiline_split": False, "prepend_instance_prompt": True, "caption_prefix": ""}
    words |= {"caption_suffix": " now", "caption_column": "caption", "filename_column": "filename"}
    folders = {"target_folder": "tables/target", "reference_folder_1": "tables/reference", "mask_folder": "tables/mask"}
    prompt = {
        "1": node("QwenEdit_CaptionSettings", caption_file="captions.jsonl", **words),
        "2": node(
            "QwenEdit_PairFolders",
            caption_strategy="jsonl",
            instance_prompt="QWE",
            caption_settings=["1", 0],
            **folders,
        ),
        "3": node("QwenEdit_PreviewPairs", dataset=["2", 0], max_pairs=2),
    }
    assert "Captions: 2 per pair, 2 in all" in text_of(comfyui.run(prompt), "3")
