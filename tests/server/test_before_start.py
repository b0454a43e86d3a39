"""What the route says before a training starts, and that Run refuses the same with the same sentences."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from tests.support.comfyui_server import PackServer
from tests.support.training_graph import (
    ENCODE,
    LOAD,
    MEMORY,
    PAIR,
    PAIRS,
    TRAIN,
    Prompt,
    cache_entries,
    changed,
    error_of,
    hidden,
    ours,
    run_dir,
    training,
)
from tools.comfyui import ComfyUIError

pytestmark = pytest.mark.server

ROUTE = "/qwen_edit_trainer/before_start"
RUN = "before"
SWAPPED = {"target_folder": f"{PAIRS}/reference_1", "reference_folder_1": f"{PAIRS}/target"}
MIXED = {"encoded_1": [ENCODE, 0], "repeats_1": 0, "probability_1": 1.0}
NO_FILES = dict.fromkeys(("transformer_file", "text_encoder_file", "vae_file"), "none found")


def asked(studio: PackServer, prompt: Prompt, node_id: str = TRAIN, *, measure_pairs: bool = False) -> dict[str, Any]:
    """The answer, with its facts by name."""
    answer = studio.post(ROUTE, {"prompt": prompt, "node_id": node_id, "measure_pairs": measure_pairs})
    return {**answer, "facts": {each["name"]: each["value"] for each in answer["facts"]}}


def said_by_run(studio: PackServer, prompt: Prompt) -> str:
    """What ComfyUI answers to Run: the errors of the nodes that it refuses, or of the node that fails."""
    try:
        queued = studio.queue(prompt)
    except ComfyUIError as refused:
        found = refused.answer["node_errors"]
        return "\n".join(error["details"] for node in found.values() for error in node["errors"])
    return error_of(studio.wait(queued))["exception_message"]


def copied_pairs(studio: PackServer, name: str) -> str:
    shutil.rmtree(studio.input / name, ignore_errors=True)
    shutil.copytree(studio.input / PAIRS, studio.input / name)
    return name


def no_pictures(studio: PackServer) -> Prompt:
    for side in ("target", "reference_1"):
        (studio.input / "no-pictures" / side).mkdir(parents=True, exist_ok=True)
    return training(RUN, folder="no-pictures")


def no_captions(studio: PackServer) -> Prompt:
    folder = copied_pairs(studio, "no-captions")
    for file in (studio.input / folder / "target").glob("*.txt"):
        file.unlink()
    return training(RUN, folder=folder)


def one_file_missing(studio: PackServer) -> Prompt:
    folder = copied_pairs(studio, "one-missing")
    (studio.input / folder / "reference_1" / "001.png").unlink()
    return training(RUN, folder=folder)


def too_large(_studio: PackServer) -> Prompt:
    prompt = training(RUN, memory_settings=["memory", 0])
    return {**prompt, "memory": ours("MemorySettings", **{**MEMORY, "vram_gib": 0.7})}


def name_used(studio: PackServer) -> Prompt:
    folder = run_dir(studio, "used")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"key": {"seed": 7}, "state": "started"}))
    return training("used")


class Mistake(NamedTuple):
    """A beginner's mistake: a prompt, the node that has it, and what must be said."""

    prompt: Callable[[PackServer], Prompt]
    node_id: str
    says: str


MISTAKES = {
    "wrong folder": Mistake(
        lambda _: changed(training(RUN), PAIR, target_folder="no_such/target"),
        PAIR,
        "target_folder is 'no_such/target', which does not exist. Put the folder into one of the folders input, output",
    ),
    "empty folder": Mistake(
        no_pictures,
        PAIR,
        "this target folder has no pictures. Put the edited pictures there, or choose another folder for the targets.",
    ),
    "captions missing": Mistake(
        no_captions,
        PAIR,
        "none of the 5 targets has a caption. One text for all: set caption_strategy to instanceprompt and write it "
        "into instance_prompt. One text each: write a file beside each target, such as 000.txt.",
    ),
    "sides swapped": Mistake(lambda _: changed(training(RUN), PAIR, **SWAPPED), PAIR, "Are the two folders swapped?"),
    "one file missing": Mistake(
        one_file_missing,
        PAIR,
        "target/001.png: there is no reference (picture before the edit) for it in input/one-missing/reference_1",
    ),
    "model missing": Mistake(
        lambda _: changed(training(RUN), LOAD, base_model="gone"),
        LOAD,
        "There is no base model 'gone' in models/diffusers.",
    ),
    "model file missing": Mistake(
        lambda _: {
            **training(RUN),
            LOAD: ours(
                "LoadModelFiles",
                **NO_FILES,
                flavour="edit-v2",
                base_model_precision="none",
                mixed_precision="no",
                quantize_via="cpu",
            ),
        },
        LOAD,
        "There is no model file in models/diffusion_models. Put one there, such as qwen_image_edit_2511_bf16",
    ),
    "too large for the card": Mistake(
        too_large,
        TRAIN,
        "The run does not fit into memory. With the smallest memory settings it still needs 0.8 GiB of VRAM",
    ),
    "run name used": Mistake(name_used, TRAIN, "The run 'used' was started with other settings or pairs:"),
    "run name with a slash": Mistake(
        lambda _: training("a/b"), TRAIN, "run_name can't be 'a/b'. Use 1 to 80 letters, digits, spaces and _ - + ."
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_before_the_start_and_by_run(name: str, studio: PackServer):
    mistake = MISTAKES[name]
    prompt, before = mistake.prompt(studio), cache_entries(studio, "latents")
    (problem,) = asked(studio, prompt)["problems"]
    said = said_by_run(studio, prompt)
    assert problem["node_id"] == mistake.node_id
    assert mistake.says in problem["text"] and mistake.says in said
    assert str(studio.base) not in problem["text"] + said  # the page says input/my_edit
    assert cache_entries(studio, "latents") == before


def test_all_mistakes_are_in_one_list(studio: PackServer):
    prompt = changed(changed(one_file_missing(studio), LOAD, base_model="gone"), TRAIN, run_name="a/b")
    prompt = changed(prompt, "optimizer", lr_scheduler="cosine", lr_warmup_steps=4)
    found = {(each["node_id"], each["text"].split(".")[0]) for each in asked(studio, prompt)["problems"]}
    assert (LOAD, "There is no base model 'gone' in models/diffusers") in found
    assert (TRAIN, "run_name can't be 'a/b'") in found
    assert any(node_id == TRAIN and "lr_warmup_steps must be less than" in text for node_id, text in found)
    assert any(node_id == PAIR and text.startswith("The dataset has 1 problem") for node_id, text in found)
    assert len(found) == 4


def test_a_wrong_name_and_a_missing_model_hide_no_other_problem(studio: PackServer):
    prompt = changed(training("a/b"), "lora", lora_targets="pattern", lora_target_pattern="no_such_layer")
    found = [each["text"] for each in asked(studio, prompt)["problems"]]
    assert [text.split()[0] for text in found] == ["run_name", "lora_target_pattern"], found
    short = {
        LOAD: ours("ChooseModel", model="gone"),
        "optimizer": changed(prompt, "optimizer", lr_scheduler="cosine", lr_warmup_steps=7)["optimizer"],
        "more": ours("MoreSettings", optimizer_settings=["optimizer", 0]),
        PAIR: prompt[PAIR],
        TRAIN: ours(
            "Train",
            model=[LOAD, 0],
            dataset=[PAIR, 0],
            more_settings=["more", 0],
            run_name="a/b",
            preset="automatic",
            max_train_steps=7,
        ),
    }
    found = [(each["node_id"], each["text"].split()[0]) for each in asked(studio, short)["problems"]]
    assert found[1:] == [(TRAIN, "The"), (TRAIN, "lr_warmup_steps")]
    assert found[0][0] == LOAD
    said = said_by_run(studio, short)
    assert "The name of the edit can't be" in said and "lr_warmup_steps must be" in said


def test_the_facts_follow_from_the_graph_and_the_cache(studio: PackServer):
    folder = copied_pairs(studio, "facts")
    shutil.rmtree(studio.output / "qwen_edit_trainer" / "cache", ignore_errors=True)
    prompt = changed(training("facts", 2, folder=folder), PAIR, caption_strategy="filename")
    files = {path for path in studio.output.rglob("*") if path.is_file()}
    before = asked(studio, prompt)
    written = {path for path in studio.output.rglob("*") if path.is_file()} - files
    assert {path.parent.name for path in written} <= {"checked"}  # of the picture check
    assert before["problems"] == []
    expected = {"pairs": 4, "held_out": 1, "to_encode": 5, "finished": False, "done": 0, "steps": 2, "rank": 4}
    expected |= {"resolution": 96, "precision": "none", "model": "2509 (edit-v2)", "time": None, "first_pictures": None}
    assert expected.items() <= before["facts"].items()
    assert 0 < before["facts"]["disk_needed"] < before["facts"]["disk_free"]
    assert 0 < before["facts"]["ram_needed"] < before["facts"]["ram_free"]
    assert studio.run(prompt)
    after = asked(studio, prompt)["facts"]
    assert (after["to_encode"], after["finished"]) == (0, True)
    again = asked(studio, changed(prompt, TRAIN, max_train_steps=3))["facts"]
    assert (again["to_encode"], again["finished"], again["done"]) == (0, False, 2)
    mixed = {**changed(prompt, TRAIN, encoded=["mix", 0]), "mix": ours("MixPairs", **MIXED)}
    facts = asked(studio, changed(mixed, TRAIN, run_name="facts-mixed"))["facts"]
    assert (facts["pairs"], facts["held_out"], facts["to_encode"]) == (4, 1, 0)


def test_what_overrides_the_preset_is_listed(studio: PackServer):
    prompt = training(RUN, preset="24gb")
    answer = asked(studio, prompt)
    assert answer["preset"]["name"] == "24gb"
    assert answer["preset"]["why"] == "Preset 24gb, as chosen."
    assert answer["preset"]["values"] == {"encoding.match_target_res": True, "batching.gradient_accumulation_steps": 1}
    found = {each["setting"]: (each["preset"], each["value"], each["by"]) for each in answer["overridden"]}
    by_lora, train = "Qwen Edit LoRA Settings", studio.our_nodes()["QwenEdit_TrainLora"]["display_name"]
    assert found == {
        "base_model_precision": ("int8-quanto", "none", "Load Qwen Edit Model"),
        "resolution": (1024, 96, "Encode Edit Pairs"),
        "max_train_steps": (2000, 4, train),
        "lora_rank": (16, 4, by_lora),
        "lora_targets": ("attention-mlp", "attention", by_lora),
        "num_validation_images": (2, 1, "Qwen Edit Validation Settings"),
    }


def test_a_name_in_use_is_told(studio: PackServer):
    prompt = changed(name_used(studio), TRAIN, if_run_exists="continue, or a new name if the settings differ")
    answer = asked(studio, prompt)
    assert answer["problems"] == []
    assert any(text.startswith("'used' was started with other settings or pairs, so") for text in answer["warnings"])


def test_other_packs_nodes_are_not_asked(studio: PackServer):
    prompt = {**training(RUN, ["steps", 0]), "steps": hidden(4)}
    answer = asked(studio, prompt)
    assert answer["problems"] == []
    assert any(text.startswith("The settings can't be known before the graph runs") for text in answer["warnings"])
    assert answer["facts"]["pairs"] == 4
    prompt = {**changed(training(RUN), ENCODE, vae=["vae", 0]), "vae": hidden(None)}
    facts = asked(studio, prompt)["facts"]
    assert (facts["pairs"], facts["to_encode"]) == (4, None)
    prompt = changed(training(RUN), TRAIN, encoded=["other", 0])
    answer = asked(studio, {**prompt, "other": hidden(1)})
    assert any(text.startswith("The pairs can't be known") for text in answer["warnings"])
    assert "pairs" not in answer["facts"]


def test_an_input_without_a_link_is_named(studio: PackServer):
    prompt = training(RUN)
    del prompt[ENCODE]["inputs"]["dataset"], prompt[TRAIN]["inputs"]["model"]
    found = {each["node_id"]: each["text"] for each in asked(studio, prompt)["problems"]}
    assert found[ENCODE].startswith("The input dataset has no link. It needs: ")
    assert found[TRAIN].startswith("The input model has no link. It needs: ")


def test_pairs_are_measured_when_asked_for(studio: PackServer):
    folder = copied_pairs(studio, "measured")
    for side in ("target", "reference_1"):
        shutil.copy(studio.input / folder / side / "000.png", studio.input / folder / side / "twin.png")
    shutil.copy(studio.input / folder / "target" / "000.txt", studio.input / folder / "target" / "twin.txt")
    prompt = training(RUN, folder=folder)
    assert not any("nearly the same" in text for text in asked(studio, prompt)["warnings"])
    answer = asked(studio, prompt, measure_pairs=True)
    assert "1 of 6 pairs: nearly the same as another pair (twin)." in answer["warnings"]
    assert [note.partition(",")[0] for note in answer["notes"]] == ["In 6 of 6 pairs"]


def test_swapped_sides_are_a_warning_if_the_captions_fit(studio: PackServer):
    prompt = changed(training(RUN), PAIR, **SWAPPED, caption_strategy="filename")
    answer = asked(studio, prompt)
    assert answer["problems"] == []
    assert "Are the two folders swapped?" in answer["warnings"][0]


def test_a_newer_request_stops_an_older_one(studio: PackServer):
    body = {"prompt": training(RUN), "node_id": TRAIN}

    def ask(answers: list[Any]) -> None:
        answers.append(studio.post(ROUTE, body))

    stopped: list[Any] = []
    for _ in range(20):  # a fast server may answer all six one after the other
        answers: list[Any] = []
        threads = [threading.Thread(target=ask, args=[answers]) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(answers) == 6
        if stopped := [answer for answer in answers if not isinstance(answer, dict)]:
            break
    assert 0 < len(stopped) < 6
    assert set(stopped) == {b""}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"prompt": [], "node_id": TRAIN}, "400"),
        ({"prompt": {}, "node_id": TRAIN, "measure_pairs": 1}, "400"),
        ({"prompt": {TRAIN: {"class_type": "QwenEdit_PlotLoss", "inputs": {}}}, "node_id": TRAIN}, "404"),
        ({"prompt": {"x": "y" * (4 << 20)}, "node_id": TRAIN}, "400"),
    ],
)
def test_other_requests_are_refused(body: dict[str, Any], status: str, studio: PackServer):
    with pytest.raises(ComfyUIError, match=status):
        studio.post(ROUTE, body)


def test_links_in_a_circle_and_long_chains_end(studio: PackServer):
    loop = training(RUN, encoded=["mix-0", 0])
    for number in range(300):
        loop[f"mix-{number}"] = ours("MixPairs", **{**MIXED, "encoded_1": [f"mix-{number + 1}", 0]})
    assert asked(studio, loop)["warnings"]
    loop["mix-1"]["inputs"]["encoded_1"] = ["mix-0", 0]
    assert asked(studio, loop)["warnings"]


def test_the_short_training_is_foreseen_too(studio: PackServer):
    prompt = {
        LOAD: ours("ChooseModel", model="demo (embedded)"),
        PAIR: training(RUN)[PAIR],
        TRAIN: ours(
            "Train", model=[LOAD, 0], dataset=[PAIR, 0], run_name="short", preset="automatic", max_train_steps=7
        ),
    }
    answer = asked(studio, prompt)
    assert answer["problems"] == []
    assert answer["preset"]["name"] == "demo"
    assert answer["preset"]["why"] == "Preset demo, because the model is the demo model."
    assert [(each["setting"], each["value"]) for each in answer["overridden"]] == [("max_train_steps", 7)]
    assert (answer["facts"]["steps"], answer["facts"]["pairs"], answer["facts"]["held_out"]) == (7, 4, 1)
    wrong = changed(changed(prompt, PAIR, target_folder="no_such"), TRAIN, run_name="a/b")
    assert [each["node_id"] for each in asked(studio, wrong)["problems"]] == [PAIR, TRAIN]
