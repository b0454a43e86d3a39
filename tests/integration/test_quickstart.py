"""The two configurations in SimpleTuner's quickstart train on the demo model, from their JSON files to a LoRA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.narrow import read_rows
from tests.support.quickstart import CONFIG, EDIT_V1, EDIT_V2, as_edit_v2, in_folders
from trainer_core.__main__ import main
from trainer_core.conditioning.encoded import load_encoded
from trainer_core.conditioning.report import encoding_report
from trainer_core.files import read_metadata, read_tensors

SMALLER = (  # changed for the demo model on a CPU; everything else is as printed
    "encoding.resolution=96",
    "encoding.match_target_res=true",
    "max_train_steps=1",
    "validation.num_validation_images=1",
    "validation.validation_resolution=96",
    "validation.validation_num_inference_steps=1",
)


@pytest.mark.parametrize(
    ("config", "data", "references"),
    [(CONFIG, EDIT_V1, 1), (as_edit_v2(CONFIG), EDIT_V2, 3)],
    ids=["edit-v1 with its embeds cache", "edit-v2 with three reference sets"],
)
def test_an_example_trains(
    config: str, data: str, references: int, tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "data.json").write_text(in_folders(data, tmp_path / "pairs", 3))
    files = (str(tmp_path / "config.json"), "--data", str(tmp_path / "data.json"))
    job = str(tmp_path / "job.json")
    changes = [part for change in (*SMALLER, f"model.tokenizer={tokenizer_dir}") for part in ("--set", change)]
    assert main(["import-simpletuner", *files, "--base", "demo", "--out", job, *changes]) == 0
    assert main(["train", job]) == 0
    lora = Path(capsys.readouterr().out.split()[-1])
    assert any(float(tensor.abs().max()) > 0 for name, tensor in read_tensors(lora).items() if "lora_B" in name)
    assert read_metadata(lora)["ss_steps"] == "1"
    run = json.loads((lora.parent / "config.json").read_text())
    assert run["model"]["base_model_precision"] == "int8-quanto" and run["noise"]["flow_schedule_shift"] == 1.73
    assert run["batching"] == {
        "train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "caption_dropout_probability": 0.0,
    }
    pair = json.loads(Path(run["encoded"]).read_text())["pairs"][0]
    assert len(pair["references"]) == references
    embeds = sorted(path.name for path in (tmp_path / "cache" / "conditioning_image_embeds").iterdir())
    assert embeds == (["my-reference-embeds"] if references == 1 else ["reference_1"])
    assert read_rows(lora.parent / "metrics.jsonl")[-1]["validation_loss"] > 0


def test_more_validated_pairs_than_there_are(
    tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With 5 pairs and num_eval_images 25, all are validated and trained on, as in SimpleTuner."""
    (tmp_path / "config.json").write_text(CONFIG.replace("{", '{\n  "num_eval_images": 25,', 1))
    (tmp_path / "data.json").write_text(in_folders(EDIT_V1, tmp_path / "pairs", 5))
    files = (str(tmp_path / "config.json"), "--data", str(tmp_path / "data.json"))
    job = str(tmp_path / "job.json")
    changes = [part for change in (*SMALLER, f"model.tokenizer={tokenizer_dir}") for part in ("--set", change)]
    assert main(["import-simpletuner", *files, "--base", "demo", "--out", job, *changes]) == 0
    assert main(["check", job]) == 0
    capsys.readouterr()
    assert main(["encode", job]) == 0
    encoded = load_encoded(Path(capsys.readouterr().out.split()[-1]))
    assert len(encoded.pairs) == len(encoded.validation_pairs) == encoded.trained_too(encoded) == 5
    assert "Pairs to train on that are also validated: 5." in encoding_report(encoded)
