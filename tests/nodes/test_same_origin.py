"""Which requests may use the routes: pages of other sites may not, also if their name leads to this server."""

from __future__ import annotations

import platform
from collections.abc import Callable
from types import ModuleType

import pytest


@pytest.fixture
def refusal(pack_module: Callable[[str], ModuleType]) -> Callable[..., str]:
    module = pack_module("same_origin")
    return lambda **headers: module.refusal({name.replace("_", "-"): value for name, value in headers.items()})


ALLOWED = [
    {"Host": "127.0.0.1:8188"},
    {"Host": "localhost:8188", "Origin": "http://localhost:8188"},
    {"Host": "LOCALHOST", "Origin": "http://localhost"},
    {"Host": "[::1]:8188", "Origin": "http://[::1]:8188"},
    {"Host": "192.168.1.20:8188", "Origin": "http://192.168.1.20:8188"},  # also through Docker's address
    {"Host": "workstation:8188", "Origin": "http://workstation:8188"},
    {"Host": "workstation.local:8188"},
    {"Host": "workstation.lan"},
    {"Host": "trainer.example", "Origin": "https://trainer.example"},  # a proxy with a certificate for the name
    {"Host": "trainer.example:443", "Origin": "https://trainer.example"},
    {"Host": "abc-8188.proxy.example", "Sec_Fetch_Site": "same-origin"},  # browsers send it only with HTTPS
    {"Host": "trainer.example", "Sec_Fetch_Site": "none"},
]
REFUSED = [
    {"Host": "127.0.0.1:8188", "Origin": "http://evil.example"},
    {"Host": "127.0.0.1:8188", "Origin": "http://127.0.0.1:8189"},
    {"Host": "127.0.0.1:8188", "Origin": "null"},
    {"Host": "127.0.0.1:8188", "Origin": ""},
    {"Host": "127.0.0.1:35313", "Origin": "http://127.0.0.1:35313.evil"},
    {"Host": "127.0.0.1:35313", "Origin": "http://[::1"},
    {"Host": "127.0.0.1:8188", "Origin": "ftp://127.0.0.1:8188"},
    {"Host": "127.0.0.1:8188", "Sec_Fetch_Site": "cross-site"},
    {"Host": "127.0.0.1:8188", "Sec_Fetch_Site": "same-site"},
    {"Host": "evil.example:8188", "Origin": "http://evil.example:8188"},  # its DNS entry now leads here
    {"Host": "evil.example:8188"},  # a GET request has no Origin
    {"Host": "127.0.0.1.evil.example"},
    {"Host": "localhost.evil.example"},
    {"Host": "evil.localx"},
    {"Host": "127.0.0.1:8188@evil.example"},
    {"Host": "evil.example/"},
    {"Host": ""},
    {},
]


@pytest.mark.parametrize("headers", ALLOWED, ids=str)
def test_allowed(headers: dict[str, str], refusal: Callable[..., str]) -> None:
    assert refusal(**headers) == ""


@pytest.mark.parametrize("headers", REFUSED, ids=str)
def test_refused(headers: dict[str, str], refusal: Callable[..., str]) -> None:
    assert refusal(**headers)


def test_the_user_can_add_names(refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    headers = {"Host": "Trainer.Example:8188", "Origin": "http://trainer.example:8188"}
    assert "QWEN_EDIT_TRAINER_HOSTS" in refusal(**headers)
    monkeypatch.setenv("QWEN_EDIT_TRAINER_HOSTS", "other.example, trainer.example")
    assert refusal(**headers) == ""
    assert refusal(**{**headers, "Origin": "http://other.example:8188"}), "the Origin must still be that of the Host"


def test_the_name_of_this_machine_is_known(refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "node", lambda: "Box.Company.Example")
    assert refusal(Host="box.company.example:8188") == ""
