"""Masks weight the loss, follow the target's crop, and are never seen by the model."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.narrow import make_pairs, read_rows, small_encoding
from trainer_core.conditioning.encode import encode_dataset
from trainer_core.conditioning.encoded import EncodedDataset, load_encoded
from trainer_core.conditioning.pictures import render
from trainer_core.conditioning.sizes import target_box, target_size
from trainer_core.config import BatchingConfig, DatasetConfig, ModelConfig, SizeConfig, TrainConfig, ValidationConfig
from trainer_core.data.masks import PairMask, loss_weights
from trainer_core.data.pairing import folder_state, pair_folders, scan_folders
from trainer_core.errors import DatasetError
from trainer_core.geometry import Box, Size
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.run import train_lora
from trainer_core.training.objective import velocity_loss

SIZE = (131, 77)


def paint(folder: Path, count: int, box: tuple[int, int, int, int] | None, size: tuple[int, int] = SIZE) -> None:
    """Saves `count` masks: white, or with `box` black with a white box."""
    folder.mkdir(exist_ok=True)
    for index in range(count):
        mask = Image.new("L", size, 255 if box is None else 0)
        if box is not None:
            mask.paste(255, box)
        mask.save(folder / f"{index:03d}.png")


@pytest.fixture
def plain(tmp_path: Path) -> DatasetConfig:
    """Three pairs whose sides are not multiples of 16."""
    return make_pairs(tmp_path / "pairs", 3, (SIZE,))


@pytest.fixture
def masked(plain: DatasetConfig, tmp_path: Path) -> DatasetConfig:
    """The same pairs with white masks in tmp_path/mask."""
    paint(tmp_path / "mask", 3, None)
    return dataclasses.replace(plain, mask_dir=str(tmp_path / "mask"))


def encode(config: DatasetConfig, model: ModelConfig, root: Path) -> EncodedDataset:
    return encode_dataset(pair_folders(config), BaseModel(model), small_encoding(num_eval_images=1), root / "cache")


def losses(encoded: EncodedDataset, model: ModelConfig, run: Path) -> list[list[float]]:
    result = train_lora(
        TrainConfig(
            run_dir=str(run),
            encoded=str(encoded.manifest),
            model=model,
            max_train_steps=2,
            batching=BatchingConfig(train_batch_size=2, gradient_accumulation_steps=1),
            validation=ValidationConfig(num_validation_images=0),
        )
    )
    rows = read_rows(result.run_dir / "metrics.jsonl")
    return [[row["loss"], row["grad_norm"], row.get("validation_loss") or 0.0] for row in rows]


def test_white_masks_change_nothing_and_others_do(
    plain: DatasetConfig, masked: DatasetConfig, model: ModelConfig, tmp_path: Path
) -> None:
    first, white = encode(plain, model, tmp_path), encode(masked, model, tmp_path)
    assert [entry.prompts for entry in white.pairs] == [entry.prompts for entry in first.pairs]
    assert [entry.references for entry in white.pairs] == [entry.references for entry in first.pairs]
    assert load_encoded(white.manifest) == white != first
    without = losses(first, model, tmp_path / "a")
    assert losses(white, model, tmp_path / "b") == without  # bit for bit, including the validation loss
    paint(tmp_path / "mask", 3, (0, 0, 60, 77))
    half = encode(masked, model, tmp_path)
    assert half.manifest != white.manifest and half.pairs[0].target == white.pairs[0].target
    changed = losses(half, model, tmp_path / "c")
    assert all(a != b for a, b in zip(changed[-1], without[-1], strict=True))


def test_weights_follow_the_targets_crop() -> None:
    size, latents = Size(*SIZE), Size(10, 10)
    encoding = small_encoding(
        resolution=80, sizes=SizeConfig(crop=True, crop_style="random", aspect_bucket_alignment=16)
    )
    bucket = target_size(size, encoding)
    box = target_box(size, bucket, encoding, "x")
    picture = Image.new("RGB", SIZE)
    picture.paste((255, 255, 255), (70, 20, 110, 60))
    weights = weights_of(picture, box, latents)
    from trainer_core.conditioning.pictures import View

    seen = render(picture, View(box, Size(80, 80), "lanczos"))[:1]
    wanted = torch.nn.functional.avg_pool2d(seen[None], 8)[0]
    assert float((weights * wanted.mean() - wanted).abs().max()) < 0.15
    assert float(weights.mean()) == pytest.approx(1, abs=1e-6)


def weights_of(picture: Image.Image, box: tuple[int, int, int, int], latents: Size) -> torch.Tensor:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mask.png"
        picture.save(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return loss_weights(PairMask(path, digest, Size(*picture.size)), Box(*box), latents)


def test_black_is_not_learned_and_a_small_region_counts_as_much() -> None:
    velocity, target = torch.randn(2, 16, 4, 4, requires_grad=True), torch.zeros(2, 16, 4, 4)
    weights = torch.ones(2, 1, 4, 4)
    weights[0, :, :, 2:] = 0
    weights[0] *= 2
    velocity_loss(velocity, target, weights).sum().backward()
    assert velocity.grad is not None and not velocity.grad[0, :, :, 2:].any() and velocity.grad[0, :, :, :2].all()
    expected = velocity.detach()[0, :, :, :2].square().mean()
    assert float(velocity_loss(velocity, target, weights)[0]) == pytest.approx(float(expected), rel=1e-6)


def test_problems_of_masks(masked: DatasetConfig, tmp_path: Path) -> None:
    mask = tmp_path / "mask"
    (mask / "000.png").unlink()
    Image.new("L", (77, 131), 255).save(mask / "001.png")
    Image.new("L", SIZE, 0).save(mask / "002.png")
    Image.new("L", SIZE, 255).save(mask / "unused.png")
    scan = scan_folders(masked)
    assert len(scan.problems) == 3 and not scan.dataset.pairs
    for words in (
        "there is no mask for it in",
        "the mask is 77 x 131, but its target is 131 x 77",
        "002.png: the mask is all black",
    ):
        assert sum(words in problem for problem in scan.problems) == 1, scan.problems
    assert any("1 picture not used (unused.png), because no target" in note for note in scan.notes)
    same = dataclasses.replace(masked, mask_dir=masked.reference_dirs[0])
    with pytest.raises(DatasetError, match=r"mask folder .* are the same folder"):
        pair_folders(same)


def test_a_crop_of_black_only_is_told() -> None:
    mask = Image.new("L", SIZE, 0)
    mask.paste(255, (0, 0, 5, 77))
    with pytest.raises(DatasetError, match="in the part of the picture that is trained"):
        weights_of(mask, (27, 0, 104, 77), Size(10, 10))


def test_a_changed_mask_changes_the_state_of_the_folders(masked: DatasetConfig, tmp_path: Path) -> None:
    before, fingerprint = folder_state(masked), pair_folders(masked).fingerprint
    paint(tmp_path / "mask", 3, (0, 0, 60, 77))
    assert folder_state(masked) != before and pair_folders(masked).fingerprint != fingerprint
    assert np.asarray(Image.open(tmp_path / "mask" / "000.png")).any()
