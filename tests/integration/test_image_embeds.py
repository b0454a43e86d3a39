"""conditioning_image_embeds: the vision tower sees each reference once, and its tokens are cached by content."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.narrow import make_pairs, small_encoding
from trainer_core.conditioning import encoders
from trainer_core.conditioning.encode import encode_dataset
from trainer_core.conditioning.encoded import EncodedDataset
from trainer_core.conditioning.encoders import Encoders, PromptEncoder
from trainer_core.conditioning.pictures import plan_pair, vision_picture
from trainer_core.config import DatasetConfig, EncodingConfig, ModelConfig
from trainer_core.data.images import open_picture
from trainer_core.data.pairing import pair_folders
from trainer_core.errors import ConfigError
from trainer_core.events import Observer
from trainer_core.files import read_tensors
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.qwen_image.flavours import FLAVOURS
from trainer_core.qwen_image.text_encoder import load_text_encoder

CPU = torch.device("cpu")
ONE_TO_SEVERAL = 1e-5  # of the largest value: with several pictures at once, the tower sums in another order


@pytest.fixture
def tower(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of patches in each call of the vision tower."""
    runs: list[int] = []

    def load(*arguments: Any) -> Any:
        encoder = load_text_encoder(*arguments)
        visual = encoder.network.model.visual
        visual.register_forward_pre_hook(lambda _, patches: runs.append(len(patches[0])))
        return encoder

    monkeypatch.setattr(encoders, "load_text_encoder", load)
    return runs


def folders_of(root: Path, count: int = 2, num_references: int = 1) -> DatasetConfig:
    """Pairs with four captions each, whose sides are not multiples of 16."""
    folders = make_pairs(root / "pairs", count, ((131, 97), (77, 120)), num_references)
    for path in Path(folders.target_dir).glob("*.txt"):
        path.write_text("make it blue\nturn it blue\nblue\nas blue as the sky")
    return folders


def tokens_in(cache: Path) -> list[Path]:
    return sorted((cache / "conditioning_image_embeds").rglob("*.safetensors"))


def encode(folders: DatasetConfig, model: ModelConfig, cache: Path, **changes: object) -> EncodedDataset:
    return encode_dataset(
        pair_folders(folders), BaseModel(model), small_encoding(**{"num_eval_images": 0, **changes}), cache
    )


def test_once_per_reference_whatever_the_captions(model: ModelConfig, tmp_path: Path, tower: list[int]) -> None:
    folders, cache = folders_of(tmp_path, 3), tmp_path / "cache"
    encoded = encode(folders, model, cache, num_eval_images=1, encode_empty_caption=True)
    prompts = [key for entry in (*encoded.pairs, *encoded.validation_pairs) for key in (*entry.prompts, entry.empty)]
    assert len(set(prompts)) == 15 and len(tower) == 3
    assert {path.parts[-3] for path in tokens_in(cache)} == {"reference_1"} and len(tokens_in(cache)) == 3
    (Path(folders.target_dir) / "000.txt").write_text("another word\nand one more")
    encode(folders, model, cache, num_eval_images=1, encode_empty_caption=True)
    assert len(tower) == 3, "new captions use the cached tokens"
    encode(folders, model, cache, preprocessing="diffusers")
    assert len(tower) == 6, "the other policy needs other tokens"


@pytest.mark.parametrize("preprocessing", ["comfyui", "diffusers"])
@pytest.mark.parametrize(("flavour", "count"), [("edit-v1", 1), ("edit-v2", 2)])
def test_embeddings_with_kept_tokens_equal_those_without(
    base_of: Callable[[str], ModelConfig],
    tmp_path: Path,
    tower: list[int],
    flavour: str,
    count: int,
    preprocessing: str,
) -> None:
    model, folders, cache = base_of(flavour), folders_of(tmp_path, 1, count), tmp_path / "cache"
    first = encode(folders, model, cache, preprocessing=preprocessing)
    before = [first.load(first.pairs[0], caption).prompt_embeds for caption in range(4)]
    shutil.rmtree(cache / "prompt")
    tower.clear()
    again = encode(folders, model, cache, preprocessing=preprocessing)
    assert tower == []
    assert all(torch.equal(again.load(again.pairs[0], caption).prompt_embeds, before[caption]) for caption in range(4))

    encoder = load_text_encoder(BaseModel(model), preprocessing, CPU)
    (pair,) = pair_folders(folders).pairs
    plan = plan_pair(pair.sizes, FLAVOURS[model.flavour], small_encoding(preprocessing=preprocessing))
    seen = [vision_picture(open_picture(path), view) for path, view in zip(pair.references, plan.vision, strict=True)]
    for caption, embeds in zip(pair.captions, before, strict=True):
        assert torch.equal(encoder.encode(caption, seen), embeds)
    together = _as_transformers_does(encoder, pair.captions[0], seen)
    assert (together - before[0]).abs().max() <= ONE_TO_SEVERAL * before[0].abs().max()
    assert (together - before[1][: len(together)]).abs().max() > 100 * ONE_TO_SEVERAL * before[0].abs().max()


def _as_transformers_does(encoder: Any, caption: str, pictures: Sequence[Any]) -> torch.Tensor:
    """Embeddings [tokens, width] from the network itself, which is given all pictures at once."""
    patches, grids = zip(*(encoder._patches(picture) for picture in pictures), strict=True)
    tokens = [int(grid.prod()) // 4 for grid in grids]
    ids = torch.tensor([encoder.token_ids(caption, tokens)])
    positions = {}
    if encoder.preprocessing == "comfyui":
        network = encoder.network.model
        kinds, mask = (ids == 151655).int(), torch.ones_like(ids)
        positions["position_ids"], _ = network.get_rope_index(ids, kinds, torch.cat(grids), attention_mask=mask)
    with torch.no_grad():
        hidden = encoder.network.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            use_cache=False,
            pixel_values=torch.cat(patches),
            image_grid_thw=torch.cat(grids),
            **positions,
        ).last_hidden_state[0]
    return hidden[-len(encoder.encode(caption, pictures)) :]


def test_content_is_the_key(base_of: Callable[[str], ModelConfig], tmp_path: Path, tower: list[int]) -> None:
    folders, cache = folders_of(tmp_path), tmp_path / "cache"
    encode(folders, base_of("edit-v2"), cache)
    encode(folders, base_of("edit-v3"), cache)
    assert len(tower) == 2, "edit-v3 uses the tokens of edit-v2, because text encoder and sizes are equal"
    reference = Path(folders.reference_dirs[0])
    for folder in (reference, Path(folders.target_dir)):  # a third pair with the first pair's pictures
        shutil.copy(folder / "000.png", folder / "002.png")
    (Path(folders.target_dir) / "002.txt").write_text("words")
    encode(folders, base_of("edit-v2"), cache)
    assert len(tower) == 2
    pixels = np.asarray(Image.open(reference / "000.png")).copy()
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(reference / "000.png")
    encode(folders, base_of("edit-v2"), cache)
    assert len(tower) == len(tokens_in(cache)) == 3


def test_one_file_as_two_references_is_seen_once(
    base_of: Callable[[str], ModelConfig], tmp_path: Path, tower: list[int]
) -> None:
    folders = folders_of(tmp_path, 2, 2)
    for name in ("000.png", "001.png"):
        shutil.copy(Path(folders.reference_dirs[0]) / name, Path(folders.reference_dirs[1]) / name)
    encode(folders, base_of("edit-v2"), tmp_path / "cache")
    assert len(tower) == 2


def test_tokens_cut_short_are_made_again(model: ModelConfig, tmp_path: Path, tower: list[int]) -> None:
    folders, cache = folders_of(tmp_path, 1), tmp_path / "cache"
    encode(folders, model, cache)
    (path,) = tokens_in(cache)
    whole = read_tensors(path)["tokens"].clone()
    path.write_bytes(path.read_bytes()[:-9])
    shutil.rmtree(cache / "prompt")
    encode(folders, model, cache)
    assert len(tower) == 2 and torch.equal(read_tensors(path)["tokens"], whole)


def test_a_named_cache_must_exist_or_be_declared(model: ModelConfig, tmp_path: Path) -> None:
    folders, cache = folders_of(tmp_path, 1), tmp_path / "cache"
    with pytest.raises(ConfigError, match=r"'my-embeds', but no cache exists yet.*create_image_embeds"):
        encode(folders, model, cache, conditioning_image_embeds="my-embeds")
    assert not cache.exists()
    encode(folders, model, cache, conditioning_image_embeds="my-embeds", create_image_embeds=True)
    assert {path.parts[-3] for path in tokens_in(cache)} == {"my-embeds"}
    encode(folders, model, cache, conditioning_image_embeds="my-embeds")
    encode(folders, model, cache)
    with pytest.raises(ConfigError, match=r"the only existing caches are my-embeds.*Did you mean 'my-embeds'"):
        encode(folders, model, cache, conditioning_image_embeds="my-embed")
    for name in ("../up", "a/b", ".hidden", "ends."):
        with pytest.raises(ConfigError, match=r"conditioning_image_embeds.*a name without folders"):
            EncodingConfig(conditioning_image_embeds=name)


@dataclasses.dataclass
class Anew:
    """A text encoder without image embeds to cache, like ComfyUI's CLIP."""

    width: int
    calls: list[tuple[str, int]]

    def see_all(self, pictures: Iterable[Any]) -> Iterator[Any]:
        yield from pictures

    def encode_all(self, prompts: Iterable[tuple[str, Sequence[Any]]]) -> Iterator[torch.Tensor]:
        for caption, seen in prompts:
            assert all(picture.shape[0] == 3 for picture in seen)
            self.calls.append((caption, len(seen)))
            yield torch.zeros(2, self.width)


def test_an_encoder_that_keeps_nothing(model: ModelConfig, tmp_path: Path) -> None:
    calls: list[tuple[str, int]] = []

    @contextmanager
    def loaded(_: Observer) -> Iterator[Anew]:
        yield Anew(BaseModel(model).prompt_width, calls)

    dataset, cache = pair_folders(folders_of(tmp_path, 1)), tmp_path / "cache"
    given = Encoders(prompts=PromptEncoder("theirs", loaded))
    named = small_encoding(num_eval_images=0, conditioning_image_embeds="mine")
    with pytest.raises(ConfigError, match="'mine', but a ComfyUI CLIP is connected"):
        encode_dataset(dataset, BaseModel(model), named, cache, encoders=given)
    encode_dataset(dataset, BaseModel(model), small_encoding(num_eval_images=0), cache, encoders=given)
    assert len(calls) == 4 and {count for _, count in calls} == {1} and tokens_in(cache) == []
