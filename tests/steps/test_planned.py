"""A run refuses what cannot fit before it starts, and says afterwards what was planned and what was measured."""

import json
import shutil
from collections import namedtuple

import pytest
from running import tiny_recipe, write_rows

from shikomi.errors import BadInput
from shikomi.progress import Silent
from shikomi.run import dry_run, train
from shikomi.steps import planned
from shikomi.steps.prepare import prepare


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


def free(monkeypatch, size):
    monkeypatch.setattr(planned, "free_bytes", lambda device: (size, size))
    monkeypatch.setattr(planned, "own_memory_bytes", lambda: 0)


def test_a_finished_run_holds_the_plan_beside_what_was_measured(tiny_llama, rows, tmp_path):
    result = train(tiny_recipe(tiny_llama, rows, tmp_path / "run", max_steps=2)).values
    peak = result["planned"]["peak_memory_bytes"]
    assert 0 < peak["low"] <= peak["likely"] <= peak["high"]
    assert result["planned"]["trainable_parameters"] == result["trainable_parameters"]
    assert result["planned"]["total_parameters"] == result["total_parameters"]
    assert "planned peak memory" in (tmp_path / "run" / "log.txt").read_text()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Planned and measured" in page and " to " in page.split("Peak memory")[1].split("</tr>")[0]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["planned"] == result["planned"]


def test_a_dry_run_holds_the_plan(tiny_llama, rows, tmp_path):
    found = dry_run(tiny_recipe(tiny_llama, rows, tmp_path / "run"))
    assert found["planned"]["trainable_parameters"] == found["trainable_parameters"]
    assert found["planned"]["total_parameters"] == found["total_parameters"]


def test_what_cannot_fit_is_refused_with_what_would(tiny_folder, rows, tmp_path, monkeypatch):
    model = tiny_folder("llama", hidden_size=256, intermediate_size=1024, vocab_size=8000)
    free(monkeypatch, 420 << 20)
    recipe = tiny_recipe(model, rows, tmp_path / "run", adapter="full", batch_size=16)
    with pytest.raises(BadInput, match=r"not enough memory for stage sft.*GB free.*fix: [a-z_.]+=.*saves") as error:
        prepare(recipe, Silent())
    assert "0.44 GB free" in error.value.message and not (tmp_path / "run").exists()
    free(monkeypatch, 64 << 30)
    prepare(recipe, Silent())


def test_a_full_disk_is_refused(tiny_llama, rows, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 1 << 40, 100))
    with pytest.raises(BadInput, match="not enough disk.*fix: choose another output_dir"):
        prepare(tiny_recipe(tiny_llama, rows, tmp_path / "run"), Silent())


@pytest.mark.parametrize("adapter, room", [("lora", 64), ({"name": "prompt", "num_virtual_tokens": 6}, 58)])
def test_rows_longer_than_the_table_of_positions_are_refused(tiny_folder, rows, tmp_path, adapter, room):
    model = tiny_folder("gpt2", n_positions=64)
    with pytest.raises(BadInput, match=f"64 positions, and rows may be longer.*fix: max_length: {room}"):
        prepare(tiny_recipe(model, rows, tmp_path / "run", adapter=adapter, max_length=room + 1), Silent())
    prepare(tiny_recipe(model, rows, tmp_path / "run", adapter=adapter, max_length=room), Silent())


def test_a_model_type_without_a_plan_still_trains(tiny_folder, rows, tmp_path, monkeypatch):
    def refuse(folder):
        raise BadInput("no plan for this architecture")

    monkeypatch.setattr(planned.Model, "of", refuse)
    found = prepare(tiny_recipe(tiny_folder("llama"), rows, tmp_path / "run"), Silent())
    assert found.planned.as_dict() == {} and found.planned.lines() == [
        "no plan of memory: no plan for this architecture"
    ]
