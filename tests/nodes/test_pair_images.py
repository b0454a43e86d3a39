"""In a real ComfyUI, pairs from the graph's images and from folders are checked and previewed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.support.comfyui_server import PackServer
from tests.support.icc import rgb_profile
from trainer_core.data.images import decode_picture, open_picture
from trainer_core.data.masks import mask_grey


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
    assert "\nIn 3 of 3 pairs, reference and target have too little in common to be aligned." in text_of(answer, "4")
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
    assert "Captions: 2 per pair, 2 in total" in text_of(comfyui.run(prompt), "3")


def coloured(folder: Path, values: list[int]) -> None:
    """Writes a grey picture for each value, all of different widths, with captions such as `value 10`."""
    folder.mkdir(parents=True)
    for value in values:
        Image.fromarray(np.full((40, 32 + value, 3), value, np.uint8)).save(folder / f"{value:03d}.png")
        (folder / f"{value:03d}.txt").write_text(f"value {value}")


def pairs_written(server: PackServer, before: set[Path]) -> list[tuple[int, int, str]]:
    """(grey value of the target, of the reference, caption) of each pair in the only folder that is not in `before`."""
    (folder,) = set((server.output / "qwen_edit_trainer" / "graph_pairs").iterdir()) - before
    found = []
    for target in sorted((folder / "target").glob("*.png")):
        pictures = (target, folder / "reference_1" / target.name)
        first, second = (int(np.asarray(Image.open(path))[0, 0, 0]) for path in pictures)
        found.append((first, second, target.with_suffix(".txt").read_text()))
    return found


def test_comfyui_own_nodes_for_folders_of_images_and_texts(comfyui: PackServer):
    """Lists of images of different sizes from ComfyUI's loader can go through its resize node before pairing."""
    coloured(comfyui.input / "own_nodes", [10, 20, 30, 40])
    graph_pairs = comfyui.output / "qwen_edit_trainer" / "graph_pairs"
    before = set(graph_pairs.iterdir()) if graph_pairs.is_dir() else set()
    prompt = {
        "1": node("LoadImageTextDataSetFromFolder", folder="own_nodes"),
        "2": node("ResizeImagesByShorterEdge", images=["1", 0], shorter_edge=64),
        "3": node("ImageInvert", image=["2", 0]),
        "4": node("QwenEdit_PairImages", target=["2", 0], reference_1=["3", 0], captions=["1", 1]),
        "5": node("QwenEdit_PreviewPairs", dataset=["4", 0], max_pairs=2),
    }
    assert text_of(comfyui.run(prompt), "5").startswith("4 pairs with 1 reference each.")
    found = pairs_written(comfyui, before)
    assert sorted(found) == [(value, 255 - value, f"value {value}") for value in (10, 20, 30, 40)]


def test_two_folders_through_comfyui_own_nodes(comfyui: PackServer):
    """References come from the node without captions. Both nodes list files in disk order; pairs go by position."""
    coloured(comfyui.input / "own_targets", [11, 21, 31])
    coloured(comfyui.input / "own_references", [101, 121, 131])
    listed = [
        [int(path.stem) for path in (comfyui.input / folder).iterdir() if path.suffix == ".png"]
        for folder in ("own_targets", "own_references")
    ]
    before = set((comfyui.output / "qwen_edit_trainer" / "graph_pairs").iterdir())
    prompt = {
        "1": node("LoadImageTextDataSetFromFolder", folder="own_targets"),
        "2": node("LoadImageDataSetFromFolder", folder="own_references"),
        "3": node("QwenEdit_PairImages", target=["1", 0], reference_1=["2", 0], captions=["1", 1]),
        "4": node("QwenEdit_PreviewPairs", dataset=["3", 0], max_pairs=2),
    }
    assert text_of(comfyui.run(prompt), "4").startswith("3 pairs with 1 reference each.")
    wanted = [(target, reference, f"value {target}") for target, reference in zip(*listed, strict=True)]
    assert pairs_written(comfyui, before) == wanted


def test_profiles_and_masks_with_a_hole_are_reported_by_check_and_preview(comfyui: PackServer):
    root = comfyui.input / "profiles"
    for part in ("target", "reference", "mask"):
        (root / part).mkdir(parents=True)
    picture = Image.fromarray(np.random.default_rng(0).integers(60, 200, (48, 64, 3)).astype(np.uint8))
    picture.save(root / "target" / "a.png")
    picture.save(root / "reference" / "a.png", icc_profile=rgb_profile("Display P3"))
    picture.putalpha(Image.fromarray(np.full((48, 64), 255, np.uint8)))
    picture.paste((0, 0, 0, 0), (0, 0, 32, 48))
    picture.save(root / "mask" / "a.png")
    folders = {f"{part}_folder{end}": f"profiles/{part}" for part, end in (("target", ""), ("reference", "_1"))}
    pairs = {"caption_strategy": "instanceprompt", "instance_prompt": "Make it blue.", "mask_folder": "profiles/mask"}
    for color_profiles, words in (
        ("convert", "converted from Display P3 to sRGB"),
        ("ignore", "not converted to sRGB"),
    ):
        prompt = {
            "1": node("QwenEdit_PairFolders", color_profiles=color_profiles, **pairs, **folders),
            "2": node("QwenEdit_CheckPairs", dataset=["1", 0], **CHECK),
            "3": node("QwenEdit_PreviewPairs", dataset=["2", 0], max_pairs=2),
        }
        answer = comfyui.run(prompt)
        for report in (text_of(answer, "2"), text_of(answer, "3")):
            assert words in report
            assert "different colour profiles: 1 (a)" in report
            assert "Transparent parts count, as in ComfyUI's mask editor." in report


def test_transparency_means_what_comfyuis_load_image_makes_of_it(comfyui: PackServer):
    """MASK is the weight of a picture with a hole; IMAGE shows the hidden colours, where training has white."""
    alpha = np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1))
    hidden = np.random.default_rng(0).integers(0, 256, (48, 64, 3)).astype(np.uint8)
    picture = Image.fromarray(hidden)
    picture.putalpha(Image.fromarray(alpha))
    path = comfyui.input / "hole.png"
    picture.save(path)
    comfyui.run(
        {
            "1": node("LoadImage", image="hole.png"),
            "2": node("MaskToImage", mask=["1", 1]),
            "3": node("SaveImage", images=["2", 0], filename_prefix="hole/mask"),
            "4": node("SaveImage", images=["1", 0], filename_prefix="hole/image"),
        }
    )
    (mask,), (image,) = ((comfyui.output / "hole").glob(f"{kind}_*.png") for kind in ("mask", "image"))
    with path.open("rb") as file:
        found = decode_picture(file, path, convert=True)
    grey, source = mask_grey(found, path)
    assert source == "hole"
    assert np.abs(np.asarray(open_picture(mask)).astype(int)[..., 0] - np.asarray(grey)).max() <= 1
    assert np.abs(np.asarray(open_picture(image)).astype(int) - hidden).max() <= 1
    assert (np.asarray(found.on_white())[:, 0] == 255).all()
