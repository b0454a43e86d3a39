"""The report of an import is short and complete, and files of the wrong kind are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.imported import ROOT, line, read
from tests.support.quickstart import CONFIG, EDIT_V1, EDIT_V2, as_edit_v2
from trainer_core.errors import ConfigError
from trainer_core.job import load_job
from trainer_core.json_text import plain_json
from trainer_core.simpletuner.convert import convert, import_simpletuner


@pytest.mark.parametrize(
    ("config", "data", "longest"),
    [(CONFIG, EDIT_V1, 17), (as_edit_v2(CONFIG), EDIT_V2, 17)],
    ids=["edit-v1", "edit-v2"],
)
def test_the_report_on_an_example_is_short(config: str, data: str, longest: int):
    """Nothing is said twice, and each key is in one line."""
    settings, datasets = json.loads(plain_json(config)), json.loads(plain_json(data))
    report = convert(settings, datasets, root=ROOT).report
    assert len(report) <= longest
    assert len({each.partition(": ")[2] for each in report}) == len(report)
    keys = [key for each in report for key in each.partition(": ")[0].split(", ")]
    keys += [
        key for each in report if "converted: " in each for key in each[:-1].partition("converted: ")[2].split(", ")
    ]
    assert [keys.count(key) for key in settings] == [1] * len(settings)
    defaults = line(convert(settings, datasets, root=ROOT), "Not in your files")
    assert "learning_rate 0.0001 (SimpleTuner's 4e-7)" in defaults
    assert "layer_prefix 'diffusion_model' (SimpleTuner's 'transformer')" in defaults
    changed = convert(settings, datasets, root=ROOT, changes=["optimizer.learning_rate=5e-5"])
    assert "learning_rate" not in line(changed, "Not in your files")


@pytest.mark.parametrize("content", ["[]", "null", "5", '"x"', "true", '[{"id": "a"}]'])
def test_json_that_is_no_configuration(content: str, tmp_path: Path):
    """The message names the file and says what it must be, in place of a key that it lacks."""
    config, data = tmp_path / "config.json", tmp_path / "data.json"
    config.write_text(content)
    data.write_text(EDIT_V1)
    for given in (data, None):
        with pytest.raises(ConfigError, match=r"config\.json must be an object with named settings, .* got ") as caught:
            import_simpletuner(config, given, root=ROOT)
        assert ("looks like multidatabackend.json" in str(caught.value)) == content.startswith("[")
    config.write_text(CONFIG)
    data.write_text(content)
    with pytest.raises(
        ConfigError, match=r"must be a list of data sets|No data set to train on|has no `id`|conditioning"
    ):
        import_simpletuner(config, data, root=ROOT)
    with pytest.raises(
        ConfigError, match=r"names the data file config/qwen_edit/multidatabackend\.json, but it is not in"
    ):
        import_simpletuner(config, root=tmp_path)
    with pytest.raises(ConfigError, match=r"data\.json must contain an object with named settings, got "):
        load_job(data)


def test_simpletuners_configuration_in_place_of_a_job(tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_text(plain_json(CONFIG))
    with pytest.raises(ConfigError, match=r"of SimpleTuner. Convert it: .* import-simpletuner .*config\.json"):
        load_job(path)
    path.write_text(CONFIG)
    with pytest.raises(ConfigError, match=r"line 4, column 36\. JSON has no comments\. Remove them\."):
        load_job(path)


def test_an_unknown_key_gets_the_nearest():
    imported = read({"learning_rte": 1e-4}, resolutoin=512)
    assert imported.report[0] == "my-edited-images.resolutoin: UNKNOWN, left out. Did you mean 'resolution'?"
    assert "'learning_rate'" in line(imported, "learning_rte: UNKNOWN")
