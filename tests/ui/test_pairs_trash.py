"""The side panel Edit pairs shows what is in a data set's trash, puts it back, and deletes it for good."""

from __future__ import annotations

import shutil

import pytest
from playwright.sync_api import expect

from tests.support.comfyui_server import PackServer
from trainer_core.demo.pictures import copy_demo_pairs

from .conftest import OpenPage

pytestmark = pytest.mark.server


def test_the_trash_is_shown_put_back_and_emptied(open_page: OpenPage, demo_server: PackServer):
    folder = demo_server.input / "trashed"
    copy_demo_pairs(folder)
    first, second, third, *others = sorted(path.stem for path in (folder / "target").glob("*.png"))
    for path in [path for path in folder.glob("*/*") if path.stem in others or path.suffix == ".txt"]:
        path.unlink()
    page = open_page()
    page.tab_button("qwen-edit-pairs").click()
    root = page.page.locator(".qet-pairs")
    root.get_by_role("combobox", name="Data set").select_option("trashed")
    trash = root.get_by_role("region", name="Trash")
    for count, key in ((2, first), (4, second)):
        root.get_by_role("listitem", name=key, exact=True).get_by_role("button", name="Delete").click()
        expect(trash).to_contain_text(f"Files in the trash: {count} (")
    page.page.route("**/restore", lambda route: route.fulfill(status=404, json={"error": "It is gone."}))
    root.get_by_role("button", name="Undo").click()
    expect(root.locator(".qet-problem").first).to_have_text("It is gone.")
    page.page.unroute("**/restore")
    assert all("/restore" in each for each in page.problems)
    page.problems.clear()
    trash.get_by_role("button", name="Put back").click()
    expect(root.get_by_role("listitem", name=second, exact=True)).to_be_visible()
    expect(trash).to_contain_text("Files in the trash: 2 (")
    trash.get_by_role("button", name="Empty…").click()
    expect(trash).to_contain_text("Files to delete for good: 2 (")
    expect(trash.get_by_role("button", name="Keep")).to_be_focused()
    page.page.keyboard.press("Enter")
    expect(trash.get_by_role("button", name="Empty…")).to_be_focused()
    page.page.keyboard.press("Enter")
    trash.get_by_role("button", name="Delete for good").click()
    expect(trash).to_be_hidden()
    expect(root.get_by_role("button", name="Undo")).to_be_hidden()
    assert not (folder / ".trash").exists()
    expect(root.locator(".qet-heading:focus")).to_be_visible()  # the focus is not lost with the button

    for key in (second, third):
        (folder / "target" / f"{key}.txt").write_text(f"edit {key}")
    page.reopen_pairs()
    root.get_by_label("One instruction for all pairs").check()
    instruction = root.get_by_role("textbox", name="Instruction for all pairs")
    instruction.fill("make it a drawing")
    page.page.keyboard.press("Tab")
    expect(trash).to_contain_text("Files in the trash: 2 (")  # the captions that were replaced
    trash.get_by_role("button", name="Empty…").click()
    trash.get_by_role("button", name="Delete for good").click()
    expect(trash).to_be_hidden()
    instruction.fill("")
    page.page.keyboard.press("Tab")
    expect(root.locator(".qet-state")).to_have_text("2 pairs. Next: Write the instruction.")
    expect(trash).to_contain_text("Files in the trash: 2 (")  # an instruction that is taken away can be put back
    assert sorted(path.name for path in (folder / "target").glob("*.png")) == [f"{second}.png", f"{third}.png"]
    shutil.rmtree(folder)
