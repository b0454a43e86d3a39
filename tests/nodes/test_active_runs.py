"""The list of runs in progress."""

from __future__ import annotations

import pytest


def test_listed_while_it_lasts(pack_module):
    runs = pack_module("active_runs")
    with runs.active_run("mine") as run:
        assert [row["run_name"] for row in runs.active_runs()] == ["mine"]
        assert not run.keep.is_set()
        assert runs.stop_and_keep("mine")
        assert run.keep.is_set()
        assert runs.active_runs()[0]["stopping"]
    assert runs.active_runs() == []
    assert not runs.stop_and_keep("mine")


@pytest.mark.parametrize("name", ["other", "../mine", "", None, 3, ["mine"], {"mine": 1}])
def test_only_known_names(name: object, pack_module):
    runs = pack_module("active_runs")
    with runs.active_run("mine") as run:
        assert not runs.stop_and_keep(name)
        assert not run.keep.is_set()


def test_gone_after_an_error(pack_module):
    runs = pack_module("active_runs")
    with pytest.raises(ZeroDivisionError), runs.active_run("mine"):
        raise ZeroDivisionError
    assert runs.active_runs() == []
