"""Splits without leaks: groups, prompts, copies and near copies are on one side; shares and strata are kept."""

import json
import random

import pytest

from shikomi.data.splits import split_file
from shikomi.errors import BadInput
from shikomi.recipe import DataSpec, Source

STARTS, ENDS = ("ba", "ce", "di", "fo", "gu", "ha", "ki"), ("ran", "tel", "mip", "sor", "vun", "lex", "qua")
WORDS = [start + end for start in STARTS for end in ENDS]


def sentence(seed: int, length: int = 14) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def rows(count: int, **columns) -> list[dict]:
    """Rows whose texts have nothing in common; a column is a function of the row's number."""
    made = []
    for i in range(count):
        made.append({"prompt": sentence(i), "completion": f"answer {i}"} | {k: of(i) for k, of in columns.items()})
    return made


@pytest.fixture
def split(tmp_path):
    """Splits these rows into a new folder: (sides by name, report)."""
    numbers = iter(range(1000))

    def act(given, shares, suffix=".jsonl", **keys):
        number = next(numbers)
        path = tmp_path / f"rows-{number}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in given))
        folder = tmp_path / f"out-{number}"
        report = split_file(DataSpec(train=(Source(path=str(path)),)), folder, shares, **keys)
        return {s: [json.loads(x) for x in p.read_text().splitlines()] for s, p in report.files.items()}, report

    return act


def test_shares_are_kept_and_every_row_is_in_one_file(split):
    given = rows(200)
    sides, report = split(given, {"validation": 0.1, "test": 0.2})
    assert (
        {side: len(found) for side, found in sides.items()}
        == {"train": 140, "validation": 20, "test": 40}
        == report.rows
    )
    key = json.dumps
    assert sorted(map(key, given)) == sorted(key(row) for found in sides.values() for row in found)
    position = {key(row): at for at, row in enumerate(given)}
    for found in sides.values():
        order = [position[key(row)] for row in found]
        assert order == sorted(order), "the order of the file is kept"
    assert [position[key(row)] for row in sides["validation"]] != list(range(20)), (
        "rows are drawn, not taken from an end"
    )


def test_the_seed_decides_and_the_order_of_the_file_does_not(split):
    given = rows(60)

    def validation(given, seed):
        return sorted(row["completion"] for row in split(given, {"validation": 0.2}, seed=seed)[0]["validation"])

    assert validation(given, 3) == validation(given[::-1], 3) != validation(given, 4)


def test_a_group_is_on_one_side_and_sides_differ(split):
    sides, report = split(rows(120, who=lambda i: f"user-{i % 24}"), {"validation": 0.25}, group="who")
    groups = {side: {row["who"] for row in found} for side, found in sides.items()}
    assert not groups["train"] & groups["validation"] and len(groups["validation"]) == 6
    assert report.linked["group"] == 96


def test_strata_have_equal_shares(split):
    sides, report = split(
        rows(200, kind=lambda i: "rare" if i % 10 == 0 else "common"), {"validation": 0.2}, stratify="kind"
    )
    assert report.strata == {"rare": {"train": 16, "validation": 4}, "common": {"train": 144, "validation": 36}}
    assert sum(row["kind"] == "rare" for row in sides["validation"]) == 4


def near_pairs(count: int) -> list[dict]:
    """Rows of which every two in succession differ by one word at the end and by their answers."""
    made = []
    for i in range(count):
        made += [{"prompt": f"{sentence(i, 30)} {end}", "completion": f"{i} {end}"} for end in ("first", "second")]
    return made


def test_copies_prompts_and_near_copies_stay_together(split):
    given = near_pairs(40)
    given += [dict(row) for row in given[::7]]  # exact copies
    given += [{**row, "completion": "another answer"} for row in given[::9]]  # the same prompt
    sides, report = split(given, {"validation": 0.3})
    stems = {side: {" ".join(row["prompt"].split()[:30]) for row in found} for side, found in sides.items()}
    assert stems["train"] and stems["validation"] and not stems["train"] & stems["validation"]
    assert report.linked.keys() == {"prompt", "near"} and report.linked["near"] == 40
    apart, report = split(given, {"validation": 0.3}, together=[])
    stems = {side: {" ".join(row["prompt"].split()[:30]) for row in found} for side, found in apart.items()}
    assert stems["train"] & stems["validation"] and report.clusters == 0


def test_a_chain_of_near_copies_is_one_cluster(split):
    words = sentence(1, 60).split()
    chain = [{"prompt": " ".join(words[k : k + 40]), "completion": f"link {k}"} for k in (0, 8, 4, 12)]
    sides, report = split(chain + rows(30), {"validation": 0.3})
    held = [sum(row["completion"].startswith("link") for row in found) for found in sides.values()]
    assert sorted(held) == [0, 4], "the third is near the first two, which are not near each other"
    assert report.linked == {"near": 3}


def test_near_copies_tie_the_groups_they_are_in(split):
    text = sentence(1, 30)
    tied = [{"prompt": sentence(50), "who": 0}, {"prompt": f"{text} first", "who": 0}]
    tied += [{"prompt": sentence(51), "who": 1}, {"prompt": f"{text} second", "who": 1}]
    given = [{"completion": f"tied {i}", **row} for i, row in enumerate(tied)] + rows(30, who=lambda i: i + 2)
    sides, report = split(given, {"validation": 0.3}, group="who")
    assert report.linked == {"group": 2, "near": 1}
    assert sorted(sum(row["who"] < 2 for row in found) for found in sides.values()) == [0, 4]


def test_an_instruction_in_front_of_all_rows_does_not_tie_them(split):
    front = "Classify this text, and answer with one of the words good or bad, nothing else, please. Text: "
    given = [{**row, "prompt": front + row["prompt"]} for row in rows(60)]
    sides, report = split(given, {"validation": 0.2})
    assert len(sides["validation"]) == 12 and not report.linked


def test_pairs_texts_and_unknown_columns_are_split_too(split):
    pairs = [{"prompt": f"q {i // 2}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(40)]
    sides, _ = split(pairs, {"validation": 0.2})
    assert not {r["prompt"] for r in sides["train"]} & {r["prompt"] for r in sides["validation"]}
    texts, _ = split([{"text": sentence(i)} for i in range(20)], {"test": 0.2})
    assert len(texts["test"]) == 4 and "validation" not in texts
    free, _ = split([{"a": sentence(i), "b": i, "who": i % 5} for i in range(20)], {"test": 0.2}, group="who")
    assert len(free["test"]) == 4


def test_what_cannot_be_split_is_refused(split):
    one_prompt = [{"prompt": "Write a poem.", "completion": sentence(i)} for i in range(10)]
    with pytest.raises(BadInput, match="no rows are left for validation") as caught:
        split(one_prompt, {"validation": 0.1})
    assert "the largest of 10 rows" in caught.value.problems[0].found
    split(one_prompt, {"validation": 0.1}, together=["copy", "near"])
    with pytest.raises(BadInput, match="no column `wo`") as caught:
        split(rows(4, who=lambda i: i), {"validation": 0.5}, group="wo")
    assert caught.value.problems[0].fix == "did you mean `who`?"
    with pytest.raises(BadInput, match="nothing is left to train on"):
        split(rows(4), {"validation": 0.5, "test": 0.5})
    with pytest.raises(BadInput, match="fewer than two rows"):
        split(rows(1), {"validation": 0.5})


def test_files_that_are_there_stay(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(10)))
    spec, folder = DataSpec(train=(Source(path=str(path)),)), tmp_path / "out"
    split_file(spec, folder, {"test": 0.2})
    before = (folder / "train.jsonl").read_bytes()
    with pytest.raises(BadInput, match="is there already"):
        split_file(spec, folder, {"test": 0.5}, seed=9)
    assert (folder / "train.jsonl").read_bytes() == before
    split_file(spec, folder, {"test": 0.5}, seed=9, force=True)
    assert (folder / "train.jsonl").read_bytes() != before
