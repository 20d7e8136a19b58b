"""The tables: known figures to the unit, verdicts that follow from memory, and a page that is current."""

import runpy
from pathlib import Path

import pytest

from shikomi.plan.architecture import known
from shikomi.plan.hardware import hardware
from shikomi.plan.memory import memory
from shikomi.plan.quoted import PUBLISHED, QUOTED, STATEMENTS, all_tables, disk, published, quoted, verdicts, weights
from shikomi.plan.tables import FULL, LORA, METHODS, QLORA, SIZES, by_size, job_of, large, most_tokens, peak

ROOT = Path(__file__).resolve().parents[2]


def test_llama_2_7b_with_r_8_on_q_and_v_to_the_unit():
    rows = {row[0]: row[1:] for row in disk().rows}
    assert rows["full model, fp32"] == ("6,738,415,616", "100%", "26.95 GB")
    assert rows["full model, bf16"][2] == "13.48 GB"
    assert rows["LoRA r=8 on q and v, fp32"] == ("4,194,304", "0.06%", "16.8 MB")
    assert rows["LoRA r=8 on q and v, bf16"][2] == "8.4 MB"


def test_the_popular_weights_are_near_what_is_stored():
    found = [(float(row[1].split()[0]), float(row[2].split()[0])) for row in weights().rows]
    assert [said for said, _ in found] == [14.0, 7.0, 3.5]
    for said, stored in found:
        assert stored == pytest.approx(said, rel=0.15)
    assert found[2][1] > 6_607_077_376 * 4 / 8 / 1e9  # more than four bits a weight: scales, and embeddings in bf16


def test_every_quoted_figure_stands_beside_the_plan_with_a_reason():
    rows = quoted().rows
    assert [(row[0], row[1], row[2]) for row in rows] == [
        (method, size, figure) for method, sizes in QUOTED.items() for size, figure in sizes.items()
    ]
    assert [row[2] for row in rows] == ["80", "160", "800+", "40", "80", "400", "24", "40", "200"]
    for row in rows:
        assert float(row[3].replace(",", "")) > 0 and len(row[4]) > 40


def test_verdicts_follow_from_the_memory():
    rows = verdicts().rows
    said = {(s.machine, s.size, s.method.name) for s in STATEMENTS}
    for needed in (("rtx-4090", "7B", QLORA.name), ("rtx-4090", "3B", LORA.name), ("rtx-3090", "7B", QLORA.name),
                   ("rtx-4060-ti-16gb", "3B", QLORA.name)):  # fmt: skip
        assert needed in said
    assert {s.machine for s in STATEMENTS} >= {"phone-4gb", "phone-6gb", "phone-8gb"}
    for statement, row in zip(STATEMENTS, rows, strict=True):
        machine = hardware(statement.machine)
        fits = float(row[3].replace(",", "")) <= float(row[4].replace(",", ""))
        assert (row[2] != "no") == fits, row
        assert row[0] == machine.title


def test_the_common_statements_of_24_gb_cards_hold():
    rows = {(row[0], row[1]): row[2] for row in verdicts().rows}
    assert rows[("NVIDIA GeForce RTX 4090", f"7B {QLORA.name}")] == "yes"
    assert rows[("NVIDIA GeForce RTX 3090", f"7B {QLORA.name}")] == "yes"
    assert rows[("NVIDIA GeForce RTX 4090", f"3B {LORA.name}")] == "yes"
    assert rows[("NVIDIA GeForce RTX 4060 Ti 16 GB", f"3B {QLORA.name}")] == "yes"


def test_memory_goes_down_from_full_to_qlora_and_up_with_the_size():
    for model in SIZES.values():
        full, lora, qlora = (peak(known(model), method).peak.likely for method in (FULL, LORA, QLORA))
        assert full > 2 * lora > 2 * qlora > 0
    rows = by_size(SIZES, "sizes").rows
    assert [row[0] for row in rows] == [method.name for method in METHODS]
    for row in rows:
        likely = [float(cell.split()[0].replace(",", "")) for cell in row[1:]]
        assert likely == sorted(likely)


def test_more_memory_takes_longer_rows_and_what_is_said_to_fit_fits():
    arch = known(SIZES["7B"])
    lengths = [most_tokens(SIZES["7B"], QLORA, hardware(name)) for name in ("rtx-3060", "rtx-4090", "a100-80gb")]
    assert lengths == sorted(lengths) and lengths[-1] > lengths[0]
    card = hardware("rtx-4090")
    most = most_tokens(SIZES["7B"], QLORA, card)
    assert memory(job_of(arch, QLORA, most), card.machine()).peak.high <= card.usable_bytes
    assert memory(job_of(arch, QLORA, 2 * most), card.machine()).peak.high > card.usable_bytes
    assert most_tokens(SIZES["70B"], FULL, card) == 0


def test_published_measurements_stand_beside_the_plan():
    assert {one.gib for one in PUBLISHED} >= {16.2, 7.4, 13.4}
    for one, row in zip(PUBLISHED, published().rows, strict=True):
        plan = memory(job_of(known(one.model), one.method, one.tokens, one.batch, one.recompute), large())
        assert row[2].startswith(f"{plan.peak.likely / (1 << 30):.1f}")
        assert plan.peak.likely / (1 << 30) == pytest.approx(one.gib, rel=0.35)
        assert one.source and one.why


def test_the_page_has_the_tables_of_this_source():
    page = (ROOT / "docs" / "guide" / "plan.md").read_text()
    assert page == runpy.run_path(str(ROOT / "docs" / "generate.py"))["plan_page"](), "run: python docs/generate.py"
    for table in all_tables():
        assert f"<!-- table {table.name} -->\n{table.title}" in page
