"""What a run is told when its settings or its dataset differ from those that it was started with."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from trainer_core.conditioning.encoded import EncodedDataset, name_dataset, save_manifest
from trainer_core.conditioning.entry import EncodedEntry
from trainer_core.config import LoraConfig, OptimizerConfig, TrainConfig, resume_key
from trainer_core.errors import RunFolderError
from trainer_core.runs.changes import dataset_changes
from trainer_core.runs.folder import RunFolder


def entry(name: str, **changes: Any) -> EncodedEntry:
    values = {
        "key": name,
        "captions": (f"edit {name}",),
        "target": f"t-{name}",
        "references": (f"r-{name}",),
        "prompts": (f"p-{name}",),
        "shape": (16, 64, 64),
        "reference_shapes": ((16, 64, 64),),
    }
    return EncodedEntry(**{**values, **changes})


PAIRS = tuple(map(entry, ("a", "b", "c", "d", "e")))


def dataset(cache: Path, pairs: tuple[EncodedEntry, ...], **changes: Any) -> EncodedDataset:
    fields = {"flavour": "edit-v1", "preprocessing": "comfyui", "prompt_width": 128, "validation_pairs": ()}
    encoded = name_dataset(cache, pairs=pairs, **{**fields, **changes})
    save_manifest(encoded)
    return encoded


def open_run(folder: Path, encoded: EncodedDataset, **changes: Any) -> None:
    config = TrainConfig(run_dir=str(folder), encoded=str(encoded.manifest), **changes)
    with RunFolder.open(folder, resume_key(config), encoded):
        pass


def refusal(folder: Path, encoded: EncodedDataset, **changes: Any) -> str:
    with pytest.raises(RunFolderError) as caught:
        open_run(folder, encoded, **changes)
    return str(caught.value)


def changed(*names: str, **changes: Any) -> tuple[EncodedEntry, ...]:
    """PAIRS with changes of those that are named."""
    return tuple(dataclasses.replace(each, **changes) if each.key in names else each for each in PAIRS)


SIZE = {"shape": (16, 96, 96), "target": "other", "prompts": ("other",)}
CASES: list[tuple[str, tuple[EncodedEntry, ...], list[str]]] = [
    ("added", (*PAIRS, entry("x"), entry("y"), entry("z")), ["3 pairs ('x', 'y', 'z') were added"]),
    ("removed", PAIRS[:-1], ["1 pair ('e') was removed"]),
    (
        "added and removed",
        (*PAIRS[2:], entry("x")),
        ["1 pair ('x') was added", "2 pairs ('a', 'b') were removed"],
    ),
    ("renamed", (*PAIRS[:-1], dataclasses.replace(PAIRS[-1], key="f")), ["1 pair ('f') got another name"]),
    (
        "captions",
        changed("b", "c", captions=("new",), prompts=("other",)),
        ["the captions of 2 pairs ('b', 'c') changed"],
    ),
    (
        "resolution",
        changed("a", "b", "c", "d", "e", **SIZE),
        ["5 pairs ('a', 'b', 'c' and 2 more) have another size: the first was 512x512 pixels, now 768x768"],
    ),
    (
        "captions and resolution",
        tuple(
            dataclasses.replace(each, **({"captions": ("new",)} if each.key in "ab" else {}), **SIZE) for each in PAIRS
        ),
        [
            "the captions of 2 pairs ('a', 'b') changed",
            "5 pairs ('a', 'b', 'c' and 2 more) have another size: the first was 512x512 pixels, now 768x768",
        ],
    ),
    (
        "reference size",
        changed("a", reference_shapes=((16, 128, 96),), references=("other",)),
        ["the references of 1 pair ('a') have another size or number: those of the first were 512x512, now 768x1024"],
    ),
    (
        "references",
        changed("a", reference_shapes=((16, 64, 64),) * 2, references=("r-a", "new")),
        [
            "the references of 1 pair ('a') have another size or number: those of the first were 512x512, now 512x512 "
            "and 512x512"
        ],
    ),
    (
        "pictures",
        changed("a", "d", target="new", prompts=("other",)),
        ["2 pairs ('a', 'd') have other pictures or crops"],
    ),
    ("mask", changed("c", mask="new"), ["1 pair ('c') has another mask"]),
    ("differences", changed("c", differences=("new",)), ["1 pair ('c') has other pixel differences"]),
    (
        "text encoder",
        changed("a", "b", "c", "d", "e", prompts=("other",)),
        ["the prompts of 5 pairs ('a', 'b', 'c' and 2 more) were encoded in another way"],
    ),
    ("repeats", changed("a", repeats=3), ["repeats or probability of 1 pair ('a') changed"]),
    ("kept", changed("a", is_regularisation=True), ["is_regularisation_data of 1 pair ('a') changed"]),
    (
        "shifted",
        changed("a", timestep_sampling_offset=0.5),
        ["timestep_sampling_offset of 1 pair ('a') changed"],
    ),
    ("order", PAIRS[::-1], ["the pairs are in another order"]),
    (
        "several",
        (*changed("a", captions=("new",), prompts=("new",))[:4], entry("x")),
        ["1 pair ('x') was added", "1 pair ('e') was removed", "the captions of 1 pair ('a') changed"],
    ),
]


@pytest.mark.parametrize(("pairs", "lines"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
@pytest.mark.parametrize("source", ["run folder", "cache"])
def test_the_dataset_in_words(source: str, pairs: tuple[EncodedEntry, ...], lines: list[str], tmp_path: Path) -> None:
    run, cache = tmp_path / "run", tmp_path / "cache"
    old = dataset(cache, PAIRS)
    open_run(run, old)
    if source == "cache":  # a run of an older version
        (run / "dataset.json").unlink()
    else:
        old.manifest.unlink()
    message = refusal(run, dataset(cache, pairs))
    said = [line.removeprefix("  - ") for line in message.splitlines() if line.startswith("  - ")]
    assert said == lines
    assert old.manifest.stem.partition("-")[0] not in message
    open_run(run, dataset(cache, PAIRS))


def test_what_is_not_known_any_more(tmp_path: Path) -> None:
    run = tmp_path / "run"
    old = dataset(tmp_path / "cache", PAIRS)
    open_run(run, old)
    old.manifest.unlink()
    no_size = {"key": "a", "shape": [], "reference_shapes": []}
    for text in ("", "[]", '{"pairs": 5}', json.dumps({"pairs": [no_size]})):
        (run / "dataset.json").write_text(text)
        assert "  - the dataset is another one:" in refusal(run, dataset(tmp_path / "cache", PAIRS[:3]))


def test_all_differences_and_the_ways_on(tmp_path: Path) -> None:
    run, encoded = tmp_path / "run", dataset(tmp_path / "cache", PAIRS)
    open_run(run, encoded)
    changes: dict[str, Any] = {
        "seed": 3,
        "lora": LoraConfig(lora_rank=64),
        "optimizer": OptimizerConfig(learning_rate=3e-4),
    }
    message = refusal(run, dataset(tmp_path / "cache", PAIRS[:4]), **changes)
    values = ("seed: was 0, now 3", "lora.lora_rank: was 16, now 64", "learning_rate: was 0.0001, now 0.0003")
    for part in (*values, "('e') was removed"):
        assert part in message, part
    assert "Undo these changes" in message and "another name" in message and "Nothing was changed" in message
    assert "init_lora" not in message, "this run has no LoRA yet"
    state = json.loads((run / "run.json").read_text())
    result = {"lora_file": "mine.safetensors", "steps": 4, "kept": False, "export": {}}
    (run / "run.json").write_text(json.dumps({**state, "result": result}))
    save_file({"weight": torch.zeros(1)}, run / "mine.safetensors")
    assert f"set init_lora to {run / 'mine.safetensors'}" in refusal(run, encoded, **changes)


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    run, encoded = tmp_path / "run", dataset(tmp_path / "cache", PAIRS)
    open_run(run, encoded)
    state = json.loads((run / "run.json").read_text())
    state["key"].update({f"from a later version {number}": "x" * 100_000 for number in range(100)})
    (run / "run.json").write_text(json.dumps(state))
    message = refusal(run, encoded)
    assert "  - and 80 more\n" in message and len(message) < 10_000


def test_the_list_of_pairs_is_added_to_an_older_run(tmp_path: Path) -> None:
    run, encoded = tmp_path / "run", dataset(tmp_path / "cache", PAIRS)
    open_run(run, encoded)
    (run / "dataset.json").unlink()
    open_run(run, encoded)
    kept = json.loads((run / "dataset.json").read_text())
    assert [row["key"] for row in kept["pairs"]] == ["a", "b", "c", "d", "e"]


def test_ten_thousand_changed_pairs_are_named_at_once() -> None:
    rows = [{"key": str(number), "captions": ["old"]} for number in range(10_000)]
    old = {"flavour": "edit-v1", "preprocessing": "comfyui", "pairs": rows}
    new = {**old, "pairs": [{**row, "captions": ["new"]} for row in rows]}
    started = time.process_time()
    assert list(dataset_changes(old, new)) == ["the captions of 10000 pairs ('0', '1', '2' and 9997 more) changed"]
    assert time.process_time() - started < 2, "each pair was compared with all others"
