"""Hostile requests to the routes about data sets: after each, nothing outside the data set exists or has changed."""

from __future__ import annotations

import io
import itertools
import json
import os
import socket
import time
import urllib.parse
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.comfyui_server import PackServer
from tests.support.data_set_requests import SETS, add, address, asked, picture, told

pytestmark = pytest.mark.server

NAMES = [
    "..",
    ".",
    "../mine",
    "..\\mine",
    "mine/../mine",
    "/etc",
    "C:\\Windows",
    "C:mine",
    "\\\\server\\share",
    "//server/share",
    "~",
    "nul",
    "CON.png",
    "mine.",
    "mine ",
    ".trash",
    "mine\x00",
    "\ud800",
    "x" * 300,
    "<script>alert(1)</script>",
    "%2e%2e",
]
JSON = "application/json"


@pytest.fixture(scope="module")
def victim(studio: PackServer) -> Path:
    """The data set `mine` in the input folder; secrets lie outside the input folder, and links lead to them."""
    told(studio, "POST", SETS, {"name": "mine"})
    for number, name in enumerate(["a_before.png", "a_after.png"]):
        add(studio, "mine", name, picture(number))
    add(studio, "mine", "a.txt", b"words")
    secrets = studio.base / "secrets"
    for side in ("reference", "target"):
        (secrets / side).mkdir(parents=True)
        (secrets / side / "secret.png").write_bytes(picture(9))
    (studio.input / "linked out").symlink_to(secrets)
    (studio.input / "half out" / "reference").mkdir(parents=True)
    (studio.input / "half out" / "target").symlink_to(secrets / "target")
    (studio.input / "plain").mkdir()
    (studio.input / "plain" / "photo.png").write_bytes(picture(10))
    return studio.input / "mine"


@pytest.fixture
def unchanged(victim: Path, studio: PackServer) -> Iterator[Path]:
    """Afterwards every file below the server's folder is as before, except the log and small pictures in the cache."""
    before = snapshot(studio)
    yield victim
    assert snapshot(studio) == before


def snapshot(server: PackServer) -> dict[str, tuple[int, int]]:
    """Size and modification time of every file below input, output, models and the secrets, without the cache."""
    found: dict[str, tuple[int, int]] = {}
    for folder in ("input", "output", "secrets", "models"):
        for place, _, names in os.walk(server.base / folder):
            for path in (Path(place, name) for name in names):
                state = path.lstat()
                found[path.relative_to(server.base).as_posix()] = state.st_size, state.st_mtime_ns
    return {name: state for name, state in found.items() if "/cache/" not in name}


def quoted(name: str) -> str:
    return urllib.parse.quote(name.encode("utf-8", "surrogatepass"), safe="")


def test_no_other_folder_is_a_data_set(unchanged: Path, studio: PackServer):
    for name in (*NAMES, "linked out", "half out", "plain"):
        place = f"{SETS}/{quoted(name)}"
        requests = {
            place: None,
            f"{place}/pictures/target/secret.png": None,
            f"{place}/pictures?name=x_before.png": picture(1),
            f"{place}/captions": b'{"all": "x"}',
            f"{place}/swap": b'{"keys": null}',
            f"{place}/delete": b'{"pictures": [{"side": "target", "file": "secret.png"}]}',
            f"{place}/hold_out": b'{"keys": ["secret"], "held_out": true}',
            f"{place}/empty_trash": b'{"state": ""}',
            f"{place}/check": b"{}",
        }
        for path, body in requests.items():
            status, _, data = asked(studio, "GET" if body is None else "POST", path, body)
            assert status in (400, 404, 405), path
            assert str(studio.base).encode() not in data
    listed = {each["name"] for each in told(studio, "GET", SETS)["data_sets"]}
    assert listed.isdisjoint({*NAMES, "linked out", "half out", "plain"})


def test_no_data_set_is_made_elsewhere(unchanged: Path, studio: PackServer):
    for name in (*NAMES, "plain", "mine", 5, None, ["x"]):
        status, _, data = asked(studio, "POST", SETS, json.dumps({"name": name}).encode())
        assert status in (400, 409), name
        assert str(studio.base).encode() not in data


def test_no_other_picture_is_read_or_moved(unchanged: Path, studio: PackServer):
    for file in (*NAMES, "../../../secrets/target/secret.png", "a.png/..", "", "target/../a.png"):
        for side in ("target", "..", "secrets", "../../secrets/target"):
            path = f"{SETS}/mine/pictures/{quoted(side)}/{quoted(file)}"
            assert asked(studio, "GET", path)[0] in (404, 405), path
            body = json.dumps({"pictures": [{"side": side, "file": file}]}).encode()
            assert asked(studio, "POST", address("mine", "/delete"), body)[0] in (400, 404), path
            body = json.dumps({"pairs": [{"reference": file, "target": "a.png", "side": side}]}).encode()
            assert asked(studio, "POST", address("mine", "/match"), body)[0] in (400, 404), path


def test_an_uploaded_name_leads_nowhere(victim: Path, studio: PackServer):
    before = snapshot(studio)
    for number, name in enumerate(f"{name}{end}" for name in NAMES for end in ("/x_before.png", "_before.png")):
        query = urllib.parse.urlencode({"name": name.encode("utf-8", "surrogatepass")})
        data = picture(50 + number, (32, 24))
        status, _, answer = asked(studio, "POST", address("mine", f"/pictures?{query}"), data, "image/png")
        assert status in (200, 400), name
        assert str(studio.base).encode() not in answer
    after = snapshot(studio)
    new = after.keys() - before.keys()
    assert {key: after.get(key) for key in before} == before
    assert all(key.startswith("input/mine/reference/") and key.count("/") == 3 for key in new)
    assert len(new) > len(NAMES)
    for key in new:
        (studio.base / key).unlink()


def test_an_upload_into_a_side_that_leads_out(victim: Path, studio: PackServer):
    link = victim / "reference_2"
    link.symlink_to(studio.base / "secrets" / "reference")
    before = snapshot(studio)
    try:
        for path in ("/pictures?side=reference_2&name=x.png", "/pictures?name=x_ref2.png"):
            assert asked(studio, "POST", address("mine", path), picture(1))[0] == 404
        assert asked(studio, "GET", address("mine"))[0] == 404
        assert snapshot(studio) == before
    finally:
        link.unlink()


BODIES = {
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
    "html": b"<!doctype html><script>alert(1)</script>",
    "cut": picture(1)[:200],
    "elf": b"\x7fELF" + bytes(100),
}


def test_files_of_a_wrong_kind(unchanged: Path, studio: PackServer):
    names = ["x_before.png", "x_before.svg", "x_before.html", "x_before.py", "held_out.txt.exe"]
    for name, (kind, body) in itertools.product(names, BODIES.items()):
        found = add(studio, "mine", name, body)
        assert (found["added"], len(found["problems"])) == ([], 1), (name, kind)


def test_a_zip_of_ten_thousand_files(unchanged: Path, studio: PackServer):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for number in range(20_001):
            archive.writestr(f"{number}_before.png", b"")
    assert add(studio, "mine", "x.zip", data.getvalue())["problems"] == [
        "The ZIP file has 20,001 files; at most 20,000 are added."
    ]


# Bodies


def raw(server: PackServer, head: str, body: bytes = b"", *, finish: bool = True) -> bytes:
    """The first bytes of the answer to a request that is written as given, and may end early."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
        if not finish:
            return b""
        return connection.recv(65536)


UPLOAD = f"POST {SETS}/mine/pictures?side=target&name=raw.png HTTP/1.1\nHost: 127.0.0.1"


def test_a_huge_stated_length(unchanged: Path, studio: PackServer):
    answer = raw(studio, f"{UPLOAD}\nContent-Length: {10**12}", b"x")
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"too large" in answer


def test_a_length_that_lies(unchanged: Path, studio: PackServer):
    """The connection ends before the stated bytes have come."""
    raw(studio, f"{UPLOAD}\nContent-Length: 5000", picture(1)[:1000], finish=False)
    _settle(studio)


def test_a_body_without_a_length(victim: Path, studio: PackServer):
    before, data = snapshot(studio), picture(70)
    chunked = b"%x\r\n" % len(data) + data + b"\r\n0\r\n\r\n"
    answer = raw(studio, f"{UPLOAD}\nTransfer-Encoding: chunked", chunked)
    assert answer.startswith(b"HTTP/1.1 200")
    after = snapshot(studio)
    del after["input/mine/target/raw.png"]
    assert after == before
    assert (victim / "target" / "raw.png").read_bytes() == data
    (victim / "target" / "raw.png").unlink()


def test_a_broken_chunked_body(unchanged: Path, studio: PackServer):
    raw(studio, f"{UPLOAD}\nTransfer-Encoding: chunked", b"fff\r\n" + picture(1)[:100], finish=False)
    raw(studio, f"{UPLOAD}\nTransfer-Encoding: chunked", b"zzz\r\nxx")
    _settle(studio)


def test_sixteen_uploads_that_never_end(unchanged: Path, studio: PackServer):
    """They keep further uploads waiting, but only until they end."""
    open_ones = [socket.create_connection(("127.0.0.1", studio.port), timeout=30) for _ in range(16)]
    try:
        for number, connection in enumerate(open_ones):
            head = f"{UPLOAD.replace('raw.png', f'{number}.png')}\nContent-Length: 5000\n\n".replace("\n", "\r\n")
            connection.sendall(head.encode() + picture(1)[:100])
        for _ in range(300):
            if sum(".tmp" in path.name for path in unchanged.iterdir()) == 16:
                break
            time.sleep(0.1)
        status, _, answer = asked(studio, "POST", address("mine", "/pictures?name=x_before.png"), picture(1))
        assert (status, b"Only 16 files are received at a time" in answer) == (429, True), answer
        assert told(studio, "GET", address("mine"))["pairs"]  # other requests are answered meanwhile
    finally:
        for connection in open_ones:
            connection.close()
    _settle(studio)
    assert asked(studio, "POST", address("mine", "/pictures?name=x_before.png"), b"")[0] == 400  # empty, but received


def _settle(server: PackServer) -> None:
    """Wait until the server has noticed that connections ended: it then removes what it had received."""
    received = [True] * 5
    for _ in range(300):
        received = [*received[1:], any(".tmp" in path.name for path in (server.input / "mine").iterdir())]
        if not any(received):
            return
        time.sleep(0.1)


def test_an_empty_body(unchanged: Path, studio: PackServer):
    assert asked(studio, "POST", address("mine", "/pictures?name=x_before.png"), b"")[0] == 400


def test_changes_with_any_body(unchanged: Path, studio: PackServer):
    bodies = [
        *(b"", b"[]", b"5", b"{", b"\xff", b"[" * 5000, b"{}"),
        *(b'{"state": true}', b'{"state": 1e999}', b'{"state": [""]}', b'{"state": ""}'),
        *(b'{"keys": 5}', b'{"keys": [5]}', b'{"keys": ["../a"]}', b'{"held_out": 1}', b'{"undo": {"a": 1}}'),
        *(b'{"pairs": "x"}', b'{"pictures": [{"side": 5}]}', b'{"captions": []}', b'{"captions": {"a": 5}}'),
        *(b'{"captions": {"a": "\\ud800"}}', b'{"captions": {"../../../secrets/target/secret": "x"}}'),
        b'{"pictures": [{"side": "target", "file": "../held_out.txt"}]}',
    ]
    actions = ("captions", "match", "swap", "hold_out", "delete", "restore", "empty_trash")
    for action, body in itertools.product(actions, bodies):
        status, _, data = asked(studio, "POST", address("mine", f"/{action}"), body)
        assert status in (400, 404), (action, body, status)
        assert "error" in json.loads(data)


# Origins and methods


def test_pages_of_other_origins(unchanged: Path, studio: PackServer):
    origins = [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Host": "evil.example:8188", "Origin": "http://evil.example:8188"},
    ]
    posts = {"/pictures?name=x_before.png": picture(1), "/captions": b'{"all": "x"}', "/swap": b'{"keys": null}'}
    posts["/empty_trash"] = b'{"state": ""}'
    for headers, prefix in itertools.product(origins, ("", "/api")):
        for rest, body in posts.items():
            assert asked(studio, "POST", prefix + address("mine", rest), body, **headers)[0] == 403, headers
        for rest in ("", "/pictures/target/a.png"):
            assert asked(studio, "GET", prefix + address("mine", rest), **headers)[0] == 403, headers


def test_changes_take_no_forms(unchanged: Path, studio: PackServer):
    """A page of another origin can send these types without asking first."""
    for kind in ("text/plain", "multipart/form-data", "application/x-www-form-urlencoded"):
        bodies = {"/swap": b'{"keys": null}', "/captions": b'{"all": "x"}', "/check": b"{}"}
        for rest, body in {**bodies, "/empty_trash": b'{"state": ""}'}.items():
            assert asked(studio, "POST", address("mine", rest), body, kind)[0] == 400
        assert asked(studio, "POST", address("mine", "/pictures?name=x_before.png"), picture(1), kind)[0] == 400


def test_reading_changes_nothing(unchanged: Path, studio: PackServer):
    for rest in ("", "/pictures/target/a.png?edge=64", "/captions?all=x", "/swap", "/restore", "/delete", "/pictures",
                 "/empty_trash", "/check", "/pictures?name=x_before.png", "/hold_out"):  # fmt: skip
        assert asked(studio, "GET", address("mine", rest))[0] in (200, 404, 405)
        for method in ("PUT", "DELETE", "PATCH"):
            assert asked(studio, method, address("mine", rest), b"{}")[0] in (404, 405)


def test_a_trash_that_leads_out_is_not_emptied(victim: Path, studio: PackServer):
    trash, secrets = victim / ".trash", studio.base / "secrets"
    trash.mkdir()
    try:
        (trash / "0123456789abcdef").symlink_to(secrets)
        found = told(studio, "GET", address("mine"))["trash"]
        assert (found["files"], found["newest"]) == (0, "")
        before = snapshot(studio)
        told(studio, "POST", address("mine", "/empty_trash"), {"state": found["state"]})
        (trash / "0123456789abcdef").unlink()
        trash.rmdir()
        trash.symlink_to(secrets)
        body = json.dumps({"state": found["state"]}).encode()
        assert asked(studio, "POST", address("mine", "/empty_trash"), body)[0] == 400
        assert {name for name in before if "/secrets/" in f"/{name}"} <= snapshot(studio).keys()
    finally:
        trash.unlink()


def test_scripts_in_names_and_captions_are_text(victim: Path, studio: PackServer):
    script = "<img src=x onerror=alert(1)>"
    found = add(studio, "mine", f"{script}_before.png", picture(60))["added"]
    told(studio, "POST", address("mine", "/captions"), {"captions": {"a": script}})
    status, headers, data = asked(studio, "GET", address("mine"))
    assert (status, headers["Content-Type"].split(";")[0], headers["X-Content-Type-Options"]) == (200, JSON, "nosniff")
    answer = json.loads(data)
    assert [pair["caption"] for pair in answer["pairs"]] == [script]
    (victim / "reference" / found[0]["file"]).unlink()
