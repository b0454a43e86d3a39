"""conditioning_multidataset_sampling random: each turn shows one reference, with the prompt encoded with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.narrow import make_pairs, picture, small_encoding
from tests.support.runs import PauseAt
from trainer_core.conditioning import batches
from trainer_core.conditioning.batches import BatchLoader, BatchPlan
from trainer_core.conditioning.encode import encode_dataset
from trainer_core.conditioning.encoded import EncodedDataset, load_encoded
from trainer_core.conditioning.entry import EMPTY_CAPTION
from trainer_core.conditioning.mix import MixPart, mix_encoded
from trainer_core.conditioning.report import encoding_report
from trainer_core.config import BatchingConfig, DatasetConfig, LoraConfig, ModelConfig, TrainConfig, ValidationConfig
from trainer_core.data.pairing import pair_folders
from trainer_core.errors import ConfigError
from trainer_core.planning.workload import largest_draws, workload_of_encoded
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.run import train_lora

BATCHING = BatchingConfig(train_batch_size=2, gradient_accumulation_steps=1, caption_dropout_probability=0.3)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sets")


@pytest.fixture(scope="module")
def folders(root: Path) -> DatasetConfig:
    """Six pairs with two references. The second one is loose, and in three pairs it has another shape."""
    config = make_pairs(root / "pairs", 6, num_references=2)
    for number in range(3):
        picture(number + 300, (128, 96)).save(Path(config.reference_dirs[1]) / f"{number:03d}.png")
    (Path(config.target_dir) / "000.txt").write_text("turn it round\nmake a negative")
    return dataclasses.replace(config, conditioning_type=("reference_strict", "reference_loose"))


@pytest.fixture(scope="module")
def encode(base_of: Callable[[str], ModelConfig], root: Path) -> Callable[..., EncodedDataset]:
    """Encodes for edit-v2 into one cache."""

    def run(folders: DatasetConfig, **changes: object) -> EncodedDataset:
        encoding = small_encoding(**{"num_eval_images": 0, "encode_empty_caption": True, **changes})
        return encode_dataset(pair_folders(folders), BaseModel(base_of("edit-v2")), encoding, root / "cache")

    return run


@pytest.fixture(scope="module")
def encoded(encode: Callable[..., EncodedDataset], folders: DatasetConfig) -> EncodedDataset:
    return encode(folders, conditioning_multidataset_sampling="random")


@pytest.fixture(scope="module")
def singles(encode: Callable[..., EncodedDataset], folders: DatasetConfig) -> list[EncodedDataset]:
    """The same pairs with only the first, and with only the second reference folder."""
    one_by_one = zip(folders.reference_dirs, folders.conditioning_type, strict=True)
    return [
        encode(dataclasses.replace(folders, reference_dirs=(each,), conditioning_type=(kind,)))
        for each, kind in one_by_one
    ]


def test_prompts_are_encoded_with_each_reference_alone(encoded: EncodedDataset, singles: list[EncodedDataset]) -> None:
    assert load_encoded(encoded.manifest) == encoded and encoded.missing() == ()
    for number, single in enumerate(singles):
        for entry, alone in zip(encoded.pairs, single.pairs, strict=True):
            assert entry.seen(number) == alone
    assert '"alone"' not in singles[0].manifest.read_text()
    assert "show one of 2 references per use: 6." in encoding_report(encoded)


def test_latents_and_words_of_a_turn_are_of_one_reference(
    encoded: EncodedDataset, singles: list[EncodedDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, seen = BatchPlan(encoded, BATCHING, 3), set()
    monkeypatch.setattr(batches, "MEMORY_BYTES", 1)  # pairs are not kept in memory but read again
    with BatchLoader(encoded, plan) as loader:
        for number in range(160):
            batch = loader[number]
            for draw, pair in zip(batch.draws, batch.pairs, strict=True):
                seen.add((draw.pair, draw.reference_set, draw.caption == EMPTY_CAPTION))
                single = singles[draw.reference_set]
                wanted = single.load(single.pairs[draw.pair], draw.caption)
                (latents,) = pair.reference_latents
                assert torch.equal(latents, wanted.reference_latents[0])
                assert torch.equal(pair.prompt_embeds, wanted.prompt_embeds)
    assert len(seen) == 6 * 2 * 2, "every pair with each of its references, with and without its caption"


def test_turns_are_a_function_of_seed_and_number(encoded: EncodedDataset) -> None:
    in_order = [BatchPlan(encoded, BATCHING, 3)[number] for number in range(60)]
    backwards = BatchPlan(encoded, BATCHING, 3)
    assert [backwards[number] for number in reversed(range(60))][::-1] == in_order
    assert [draw.index for batch in in_order for draw in batch] == list(range(120))
    other = [BatchPlan(encoded, BATCHING, 4)[number] for number in range(60)]
    assert [[d.reference_set for d in batch] for batch in other] != [[d.reference_set for d in b] for b in in_order]
    share = [draw.reference_set for batch in in_order for draw in batch]
    assert 0.35 < sum(share) / len(share) < 0.65


def test_a_held_out_pair_keeps_one_reference(
    encode: Callable[..., EncodedDataset], folders: DatasetConfig, singles: list[EncodedDataset]
) -> None:
    held = encode(folders, conditioning_multidataset_sampling="random", num_eval_images=-1)
    assert held == encode(folders, conditioning_multidataset_sampling="random", num_eval_images=-1)
    chosen = []
    for entry in held.validation_pairs:
        assert entry.prompts_by_reference == () and len(entry.references) == 1 and len(held.load_pictures(entry)) == 2
        matching = [
            number
            for number, single in enumerate(singles)
            for other in single.pairs
            if other.key == entry.key and (other.references, other.prompts) == (entry.references, entry.prompts)
        ]
        chosen += matching
        assert entry.negative not in entry.prompts
    assert len(chosen) == 6 and set(chosen) == {0, 1}


def test_a_run_that_stopped_equals_the_unbroken_one(
    encode: Callable[..., EncodedDataset], folders: DatasetConfig, base_of: Callable[[str], ModelConfig], tmp_path: Path
) -> None:
    encoded = encode(folders, conditioning_multidataset_sampling="random", num_eval_images=1)
    config = TrainConfig(
        run_dir=str(tmp_path / "whole"),
        encoded=str(encoded.manifest),
        model=base_of("edit-v2"),
        max_train_steps=7,
        lora=LoraConfig(lora_rank=2),
        batching=BATCHING,
        validation=ValidationConfig(validation_num_inference_steps=1),
    )
    whole, broken = train_lora(config), dataclasses.replace(config, run_dir=str(tmp_path / "broken"))
    for step in (2, 5):
        assert train_lora(broken, PauseAt(step)).steps_done == step
    again = train_lora(broken)
    assert whole.lora_file is not None and again.lora_file is not None
    first, second = load_file(whole.lora_file), load_file(again.lora_file)
    assert all(torch.equal(second[name.replace("whole", "broken")], each) for name, each in first.items())
    combined = encode(folders, num_eval_images=1)
    other = train_lora(dataclasses.replace(config, run_dir=str(tmp_path / "combined"), encoded=str(combined.manifest)))
    assert other.lora_file is not None
    assert any(not torch.equal(first[name], each) for name, each in load_file(other.lora_file).items())


def test_edit_v1_takes_several_folders_one_at_a_time(
    base_of: Callable[[str], ModelConfig], folders: DatasetConfig, tmp_path: Path
) -> None:
    dataset, model = pair_folders(folders), base_of("edit-v1")
    with pytest.raises(ConfigError, match="conditioning_multidataset_sampling to random"):
        encode_dataset(dataset, BaseModel(model), small_encoding(), tmp_path / "cache")
    encoding = small_encoding(conditioning_multidataset_sampling="random")
    encoded = encode_dataset(dataset, BaseModel(model), encoding, tmp_path / "cache")
    assert {len(entry.prompts_by_reference) for entry in encoded.pairs} == {2}
    with pytest.raises(ConfigError, match="without the empty caption"):
        BatchPlan(encoded, BATCHING, 0)


def test_references_that_are_missing_and_a_mix(
    encode: Callable[..., EncodedDataset], encoded: EncodedDataset, root: Path
) -> None:
    config = make_pairs(root / "optional", 4, num_references=2)
    for number, key in ((0, "000"), (1, "001"), (0, "002"), (1, "002")):
        (Path(config.reference_dirs[number]) / f"{key}.png").unlink()
    optional = encode(
        dataclasses.replace(config, references_optional=True), conditioning_multidataset_sampling="random"
    )
    assert [len(entry.prompts_by_reference) for entry in optional.pairs] == [0, 0, 0, 2]
    assert [len(entry.seen(0).references) for entry in optional.pairs] == [1, 1, 0, 1]
    parts = [MixPart(encoded=optional, repeats=1), MixPart(encoded=encoded, probability=0.5)]
    mixed = mix_encoded(parts, root / "cache")
    assert load_encoded(mixed.manifest) == mixed
    plan = BatchPlan(mixed, BATCHING, 1)
    draws = [draw for number in range(60) for draw in plan[number]]
    several = {draw.pair for draw in draws if draw.reference_set}
    assert several == {3, 4, 5, 6, 7, 8, 9}
    with BatchLoader(mixed, plan) as loader:
        assert {len(pair.reference_latents) for number in range(20) for pair in loader[number].pairs} == {0, 1}


def test_the_largest_micro_batch_is_the_largest_as_seen(encoded: EncodedDataset) -> None:
    """A pair counts with the reference that the turn shows, not with all its references together."""
    first, *others = encoded.pairs
    channels, height, width = first.shape
    first = dataclasses.replace(first, reference_shapes=((channels, height * 4, width), (channels, 2, 2)))
    others = [dataclasses.replace(each, reference_shapes=((channels, height * 3, width),) * 2) for each in others]
    sized = dataclasses.replace(encoded, pairs=(first, *others))
    work = workload_of_encoded(sized, BatchingConfig(), ValidationConfig(), sized)
    (draw,) = largest_draws(sized, work)
    assert (draw.pair, draw.reference_set) == (0, 0)


def test_every_caption_has_its_turn(singles: list[EncodedDataset]) -> None:
    """The first pair has two captions, the others one. Seed and turn decide which caption is used."""
    encoded, batching = singles[0], BatchingConfig(gradient_accumulation_steps=1)
    plan = BatchPlan(encoded, batching, 7)
    turns = [plan[number][0] for number in range(60)]
    assert {(draw.pair, draw.caption) for draw in turns} == {(0, 0), (0, 1), *((pair, 0) for pair in range(1, 6))}
    assert turns == [BatchPlan(encoded, batching, 7)[number][0] for number in range(60)]
    assert turns != [BatchPlan(encoded, batching, 8)[number][0] for number in range(60)]
    first, second = (encoded.load(encoded.pairs[0], caption).prompt_embeds for caption in (0, 1))
    with BatchLoader(encoded, plan) as loader:
        for number, draw in enumerate(turns):
            if draw.pair == 0:
                assert torch.equal(loader[number].pairs[0].prompt_embeds, second if draw.caption else first)
