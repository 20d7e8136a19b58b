"""The memory plan against real runs that were measured before (benchmarks/plan_memory.py writes them down)."""

import importlib
import json

import pytest


@pytest.fixture(scope="module")
def bench(repository):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(repository / "benchmarks")
        yield importlib.import_module("plan_memory")


@pytest.fixture(scope="module")
def planned(bench, tmp_path_factory, smollm2_folder):
    """(what was measured, bytes planned now) of every run."""
    folder = tmp_path_factory.mktemp("planned")
    lines = [json.loads(line) for line in bench.RECORD.read_text().splitlines()]
    cells = [bench.Cell(**line["cell"]) for line in lines]
    return [
        (line, bench.planned(cell, line["arithmetic"], folder, folder / "models"))
        for line, cell in zip(lines, cells, strict=True)
    ]


def test_errors_are_within_what_is_promised(bench, planned):
    assert len(planned) >= 60
    median, p95, low = bench.errors_of([now / line["peak"] - 1 for line, now in planned])
    assert median <= bench.MEDIAN and p95 <= bench.P95 and low >= -bench.TOO_LOW


def test_the_plan_is_what_was_published(planned):
    """A changed plan is seen: `python benchmarks/plan_memory.py` writes it down, here and in docs/results.md."""
    for line, now in planned:
        assert now == pytest.approx(line["planned"], rel=1e-4), line["cell"]
