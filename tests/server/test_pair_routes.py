"""The page's routes about data sets, and the node that takes one: what they write, read and refuse."""

from __future__ import annotations

import io
import json
import urllib.parse
import zipfile
from typing import Any

import pytest
from PIL import Image

from tests.support.comfyui_server import PackServer
from tests.support.data_set_requests import SETS, add, address, asked, change, picture, told
from tests.support.data_sets import files
from tests.support.training_graph import PAIR, TRAIN, error_of, helper, ours, place_pairs, training

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def mine(studio: PackServer) -> str:
    """The name of a data set that was made through the routes: two pairs, and a picture on each side."""
    assert told(studio, "POST", SETS, {"name": "my edit"}) == {"name": "my edit"}
    for number, name in enumerate(["a_before.png", "a_after.png", "b_0.png", "b_1.png"]):
        assert add(studio, "my edit", name, picture(number))["problems"] == []
    add(studio, "my edit", "before only.png", picture(20), "reference")
    add(studio, "my edit", "after only.png", picture(21), "target")
    return "my edit"


def contents(server: PackServer, name: str) -> dict[str, Any]:
    return told(server, "GET", f"{SETS}/{urllib.parse.quote(name)}")


def test_listed(mine: str, studio: PackServer):
    found = told(studio, "GET", SETS)
    assert found["uploads"] is True
    assert set(found["limits"]) >= {"file_bytes", "files", "pixels", "set_bytes"}
    (listed,) = [each for each in found["data_sets"] if each["name"] == mine]
    assert listed["pairs"] == 2
    assert listed["changed"] > 1_500_000_000
    status, headers, data = asked(studio, "POST", SETS, json.dumps({"name": "My Edit"}).encode())
    assert (status, "already has" in json.loads(data)["error"]) == (409, True)
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"


def test_contents(mine: str, studio: PackServer):
    found = contents(studio, mine)
    assert [(pair["key"], pair["reference"][0]["file"], pair["target"]["file"]) for pair in found["pairs"]] == [
        ("a", "a.png", "a.png"),
        ("b", "b.png", "b.png"),
    ]
    assert found["pairs"][0]["target"]["width"] == 64
    assert [(each["side"], each["file"]) for each in found["unmatched"]] == [
        ("reference", "before only.png"),
        ("target", "after only.png"),
    ]
    assert str(studio.base) not in json.dumps(found)


def test_small_pictures(mine: str, studio: PackServer):
    version = contents(studio, mine)["pairs"][0]["target"]["version"]
    path = f"{SETS}/my%20edit/pictures/target/a.png"
    status, headers, data = asked(studio, "GET", f"{path}?edge=32&v={version}")
    assert (status, headers["Content-Type"], headers["X-Content-Type-Options"]) == (200, "image/jpeg", "nosniff")
    assert Image.open(io.BytesIO(data)).size == (64, 48)
    assert headers["Cache-Control"].startswith("private")
    assert asked(studio, "GET", f"{path}?v=old")[1]["Cache-Control"] == "no-store"
    for wrong in (f"{path}?edge=x", f"{SETS}/my%20edit/pictures/target/gone.png", f"{SETS}/gone/pictures/target/a.png"):
        assert asked(studio, "GET", wrong)[0] == 404


def test_captions_marks_partners_and_sides(mine: str, studio: PackServer):
    folder = studio.input / mine
    assert change(studio, mine, "captions", {"all": "turn it <b>blue</b>"})["undo"] == ""
    change(studio, mine, "captions", {"captions": {"b": "turn it red"}})
    change(studio, mine, "hold_out", {"keys": ["b"], "held_out": True})
    found = contents(studio, mine)
    assert [(pair["caption"], pair["held_out"]) for pair in found["pairs"]] == [
        ("turn it <b>blue</b>", False),
        ("turn it red", True),
    ]
    status, _, data = asked(studio, "POST", address(mine, "/pictures?name=c.txt"), b"words", "text/plain")
    assert (status, json.loads(data)["added"]) == (200, [{"file": "c.txt", "side": "target"}])
    change(studio, mine, "match", {"pairs": [{"reference": "before only.png", "target": "after only.png"}]})
    assert (folder / "reference" / "after only.png").read_bytes() == picture(20)
    change(studio, mine, "swap", {"keys": ["after only"]})
    assert (folder / "reference" / "after only.png").read_bytes() == picture(21)
    undo = change(studio, mine, "delete", {"pictures": [{"side": "target", "file": "a.png"}]})["undo"]
    assert [pair["key"] for pair in contents(studio, mine)["pairs"]] == ["after only", "b"]
    assert change(studio, mine, "restore", {"undo": undo})["restored"] == 2
    assert [pair["key"] for pair in contents(studio, mine)["pairs"]] == ["a", "after only", "b"]


def test_a_zip(studio: PackServer):
    told(studio, "POST", SETS, {"name": "zipped"})
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for number, name in enumerate(["x/before/a.png", "x/after/a.png"]):
            archive.writestr(name, picture(number))
        archive.writestr("x/after/a.txt", "turn it blue")
    found = add(studio, "zipped", "x.zip", data.getvalue())
    assert len(found["added"]) == 3
    assert [pair["caption"] for pair in contents(studio, "zipped")["pairs"]] == ["turn it blue"]


def test_the_check(studio: PackServer):
    told(studio, "POST", SETS, {"name": "checked"})
    for side in ("before", "after"):
        add(studio, "checked", f"same_{side}.png", picture(5))
        add(studio, "checked", f"torn_{side}.png", picture(6))
    torn = studio.input / "checked" / "target" / "torn.png"
    torn.write_bytes(torn.read_bytes()[:-30])
    found = told(studio, "POST", f"{SETS}/checked/check", {})
    assert "hardly differ" in found["findings"]["same"][0]
    assert "damaged or cut short" in found["findings"]["torn"][0]
    assert str(studio.base) not in json.dumps(found)


# The node


def node(**inputs: Any) -> dict[str, Any]:
    pairs = ours("EditPairs", **{"data_set": "my edit", "instruction": "", **inputs})
    return {"pairs": pairs, "report": ours("PreviewPairs", dataset=["pairs", 0], max_pairs=2),
            "text": helper("SaveText", value=["report", 1])}  # fmt: skip


def test_the_node_lists_data_sets(mine: str, studio: PackServer):
    (kind, options), _ = studio.our_nodes()["QwenEdit_EditPairs"]["input"]["required"].values()
    choices = options["options"] if kind == "COMBO" else kind
    assert choices[-1] == "demo (embedded)"
    assert {"my edit", "pairs"} <= set(choices)


def test_the_node_pairs(mine: str, studio: PackServer):
    studio.run(node())
    (studio.input / mine / "target" / "b.txt").write_text("turn it green")
    studio.run(node())
    studio.run(node(data_set="demo (embedded)"))


def test_marks_count_before_the_start(studio: PackServer):
    place_pairs(studio, "marked")
    change(studio, "marked", "hold_out", {"keys": ["000", "002", "003"], "held_out": True})
    prompt = {**training("marked"), PAIR: ours("EditPairs", data_set="marked", instruction="")}
    asked_for = {"prompt": prompt, "node_id": TRAIN, "measure_pairs": False}
    answer = studio.post("/qwen_edit_trainer/before_start", asked_for)
    assert answer["problems"] == []
    assert {each["name"]: each["value"] for each in answer["facts"]}["held_out"] == 3


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gone", "There is no data set 'gone' in"),
        ("../pairs", "There is no data set '../pairs'"),
        ("", "no data set '' "),
    ],
)
def test_an_unknown_data_set(name: str, said: str, mine: str, studio: PackServer):
    from tools.comfyui import ComfyUIError

    with pytest.raises(ComfyUIError) as caught:
        studio.queue(node(data_set=name))
    (problem,) = caught.value.answer["node_errors"]["pairs"]["errors"]
    assert said in problem["details"]
    assert "press Edit pairs… and drop" in problem["details"]


def test_an_empty_data_set(studio: PackServer):
    told(studio, "POST", SETS, {"name": "empty"})
    said = error_of(studio.wait(studio.queue(node(data_set="empty"))))["exception_message"]
    assert "The data set 'empty' has no pictures yet. In the side panel Edit pairs, choose" in said


def test_no_instruction(studio: PackServer):
    told(studio, "POST", SETS, {"name": "silent"})
    for side in ("before", "after"):
        add(studio, "silent", f"a_{side}.png", picture(len(side)))
    said = error_of(studio.wait(studio.queue(node(data_set="silent"))))["exception_message"]
    assert "1 pair without an instruction (a). In the side panel Edit pairs, write what the edit does" in said
    studio.run(node(data_set="silent", instruction="turn it blue"))


def set_uploads(server: PackServer, value: str) -> None:
    server.run({"1": helper("Environment", name="QWEN_EDIT_TRAINER_UPLOADS", value=value)})


def test_changes_that_are_off(mine: str, studio: PackServer):
    before = files(studio.input)
    posts = {
        f"{SETS}/my%20edit/captions": b'{"all": "x"}',
        f"{SETS}/my%20edit/match": b'{"pairs": [{"reference": "a.png", "target": "b.png"}]}',
        f"{SETS}/my%20edit/swap": b'{"keys": null}',
        f"{SETS}/my%20edit/hold_out": b'{"keys": ["a"], "held_out": true}',
        f"{SETS}/my%20edit/delete": b'{"pictures": [{"side": "target", "file": "a.png"}]}',
        f"{SETS}/my%20edit/restore": b'{"undo": "0000000000000000"}',
        f"{SETS}/my%20edit/pictures?name=z_before.png": picture(3),
        SETS: b'{"name": "new"}',
    }
    set_uploads(studio, "off")
    try:
        assert told(studio, "GET", SETS)["uploads"] is False
        for path, body in posts.items():
            status, _, data = asked(studio, "POST", path, body)
            assert (status, "QWEN_EDIT_TRAINER_UPLOADS=off" in json.loads(data)["error"]) == (403, True), path
        assert len(contents(studio, mine)["pairs"]) >= 2
        assert told(studio, "POST", f"{SETS}/my%20edit/check", {})["notes"] is not None
    finally:
        set_uploads(studio, "")
    assert files(studio.input) == before
    assert told(studio, "GET", SETS)["uploads"] is True
