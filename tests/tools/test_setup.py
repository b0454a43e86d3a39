"""How set-up finds a browser. The rest of set-up is tested by making the environment that runs these tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import setup


@pytest.fixture
def no_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, the only one on PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CHROMIUM", raising=False)
    return tmp_path


def test_a_named_browser_comes_first(no_browser: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CHROMIUM", "/opt/chrome")
    assert setup.find_browser() == "/opt/chrome"


def test_one_on_the_path_is_found(no_browser: Path):
    assert setup.find_browser() == ""
    program = no_browser / "chromium"
    program.touch(mode=0o755)
    assert setup.find_browser() == str(program)


def test_without_one_it_is_installed_by_apt_or_asked_for(
    no_browser: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    setup.get_browser()
    assert "apt install chromium" in capsys.readouterr().err
    (no_browser / "apt-get").touch(mode=0o755)
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(setup, "apt", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(setup.os, "geteuid", lambda: 0, raising=False)
    setup.get_browser()
    assert [arguments[0] for arguments in asked] == ["update", "install"]
    assert "chromium" in asked[1]
