"""The documents name files, commands and settings correctly."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from tools import settings_reference
from tools.comfyui import REPO
from trainer_core import config
from trainer_core.__main__ import _parser
from trainer_core.config.dataset import CaptionStrategy
from trainer_core.qwen_image.flavours import FLAVOURS
from trainer_core.qwen_image.recognise import download, template_files

FOLDERS = (".", "docs", "web/docs", "benchmarks", "trainer_core/demo/model")
PAGES = sorted(page for folder in FOLDERS for page in (REPO / folder).glob("*.md"))
WRAPPED = [page for page in PAGES if not page.is_relative_to(REPO / "web")]
OWN = [page for page in PAGES if page.parent.name == "docs" or page.name == "README.md"]
TOP_FOLDERS = sorted(
    path.name for path in REPO.iterdir() if path.is_dir() and path.name[0] not in "._" and path.name != "node_modules"
)


def name(page: Path) -> str:
    return page.relative_to(REPO).as_posix()


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def without_code(page: Path) -> str:
    """The page without fenced and indented code blocks. Inline code stays."""
    lines, fenced = [], False
    for line in text(page).splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith("    "):
            lines.append(line)
    return "\n".join(lines)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub generates from the headings."""
    headings = re.findall(r"^#+ (.+)$", without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def command_lines(page: Path) -> Iterator[str]:
    """Lines of code blocks. Lines continued with a backslash are joined."""
    blocks = re.findall(r"^```\n(.*?)^```", text(page), re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^ {4,}\S.*$", text(page), re.MULTILINE)
    for line in "\n".join([*blocks, *indented]).replace("\\\n", " ").splitlines():
        yield line.strip()


def test_settings_page_is_what_the_settings_say():
    """The settings page and the JSON schema are current. `make docs` regenerates both."""
    assert text(settings_reference.FILE) == settings_reference.reference()
    assert text(settings_reference.SCHEMA) == settings_reference.schema_text()


def test_settings_page_has_every_setting_and_its_limits():
    page = text(settings_reference.FILE)
    classes = [cls for cls in vars(config).values() if isinstance(cls, type) and dataclasses.is_dataclass(cls)]
    assert {cls for cls, _, _ in settings_reference.SECTIONS} == set(classes)
    for cls in classes:
        assert all(f"| `{field.name}` |" in page for field in dataclasses.fields(cls)), cls
    assert "| `lora_rank` | whole number: 1 to 1024 | `16` |" in page
    assert "| `adam_epsilon` | number: above 0 |" in page
    assert "| `num_eval_images` | whole number: -1 or more |" in page


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_of_the_repository_that_are_named_are_there(page: Path):
    spans = re.findall(r"`([^`\n]+)`", without_code(page))
    for span in spans:
        if span.split("/")[0] in TOP_FOLDERS and "/" in span and not re.search(r"[<*\s]", span):
            assert (REPO / span).exists(), span
    for template in re.findall(r"(?<!\*)\*(Qwen edit LoRA - [^*\n]+)\*(?!\*)", without_code(page)):
        assert (REPO / "workflows" / f"{template}.json").is_file(), template


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_that_are_named_are_there(page: Path):
    targets = set(re.findall(r"^([a-z]+):", text(REPO / "Makefile"), re.MULTILINE))
    named = [*re.findall(r"`make ([a-z]+)", text(page)), *re.findall(r"^ {4}make ([a-z]+)", text(page), re.MULTILINE)]
    assert set(named) <= targets
    for line in command_lines(page):
        if line.startswith("python -m trainer_core"):
            arguments = shlex.split(line.split("python -m trainer_core")[1], comments=True)
            _parser().parse_args(arguments)
        for script in re.findall(r"(?:python3?|cat) ((?:tools|workflows)/[\w/.]+)", line):
            assert (REPO / script).is_file(), script


@pytest.mark.parametrize("page", OWN, ids=name)
def test_configurations_are_accepted(page: Path):
    for block in re.findall(r"^```json\n(.*?)^```", text(page), re.MULTILINE | re.DOTALL):
        config.from_json(config.JobConfig, json.loads(block))


@pytest.mark.parametrize("page", WRAPPED, ids=name)
def test_lines_are_short(page: Path):
    """Tables and addresses can't be wrapped. Help pages have a line for each item, because they are generated."""
    lines = [line for line in without_code(page).splitlines() if not line.startswith("|") and "](http" not in line]
    assert [line for line in lines if len(line) > 120] == []


def test_the_readme_is_a_landing_page():
    """The README stays short; details belong in docs/."""
    assert len(text(REPO / "README.md").splitlines()) <= 130


def test_the_table_of_folders_is_complete():
    table = text(REPO / "docs" / "architecture.md").split("## Folders")[1].split("\n## ")[0]
    named = re.findall(r"`([\w.]+)/`", " ".join(line.split("|")[1] for line in table.splitlines() if "|" in line))
    assert set(named) >= set(TOP_FOLDERS) > {"nodes", "web"}


def test_every_flavour_and_its_files_are_in_the_readme_and_an_example_in_the_headless_page():
    readme = text(REPO / "README.md")
    assert "```json" in text(REPO / "docs" / "headless.md")
    for flavour in FLAVOURS.values():
        assert f"| `{flavour.name}` | [{flavour.released_as}](https://huggingface.co/{flavour.released_as}) |" in readme
    files = [each for folder in ("diffusion_models", "text_encoders", "vae") for each in template_files(folder)]
    linked = re.findall(r"\]\((https://huggingface\.co/Comfy-Org/[^)]+)\)", readme)
    assert len(linked) >= 3
    assert set(linked) <= {download(each).url for each in files}


def test_settings_that_are_recommended_exist():
    table = text(REPO / "docs" / "how-to.md").split("## Choose settings")[1].split("\n## ")[0]
    recommended = re.findall(r"`(\w+)`", " ".join(line.split("|")[1] for line in table.splitlines() if "|" in line))
    known = {field.name for cls, _, _ in settings_reference.SECTIONS for field in dataclasses.fields(cls)}
    assert len(recommended) > 5
    assert set(recommended) <= known


@pytest.mark.parametrize("page", OWN, ids=name)
def test_pictures_are_small(page: Path):
    for target in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text(page)):
        assert (page.parent / target).stat().st_size < 300_000, target


def test_the_reference_has_every_source_of_captions():
    rows = re.findall(r"^\| (`.+?`) \|", text(REPO / "docs" / "reference.md"), re.MULTILINE)
    named = {kind for row in rows for kind in re.findall(r"`(\w+)`", row)}
    assert set(get_args(CaptionStrategy)) <= named
