"""The preview shows what is trained: the tokens, masks, cuts and packing of the run itself."""

import json
import re

import pytest
from preference_rows import pairs, thumbs, write
from running import tiny_recipe, write_rows

from shikomi.errors import BadInput
from shikomi.progress import Silent
from shikomi.run import train
from shikomi.steps.preview import preview, text_of
from shikomi.steps.preview_page import as_page, as_text

LONG = "What is this here, please, and what is it for? "


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl")


@pytest.fixture
def look(tiny_llama, tmp_path):
    """The only stage of a recipe on these rows."""

    def act(data, rows=3, row=None, **keys):
        (stage,) = preview(tiny_recipe(tiny_llama, data, tmp_path / "run", **keys), Silent(), rows, row)
        return stage

    return act


def shown_text(recipe) -> str:
    from rich.console import Console

    console = Console(width=200, no_color=True)
    with console.capture() as captured:
        console.print(as_text(preview(recipe, Silent()), brackets=True))
    return captured.get()


@pytest.mark.parametrize("objective", ["sft", "dpo", "kto"])
def test_the_step_is_the_one_that_is_trained(objective, tiny_llama, tmp_path):
    data = tmp_path / "data.jsonl"
    write_rows(data) if objective == "sft" else write(data, pairs() if objective == "dpo" else thumbs())
    recipe = tiny_recipe(tiny_llama, data, tmp_path / "run", objective=objective, max_steps=1, micro_batch_tokens=90)
    (stage,) = preview(recipe, Silent(), 0)
    train(recipe)
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert stage.step == 1 and len(stage.batches) > 1
    assert sum(batch.tokens for batch in stage.batches) == record["tokens"]
    assert sum(batch.computed for batch in stage.batches) == record["computed_tokens"]
    assert all(batch.computed == sum(s.tokens for s in batch.segments) for batch in stage.batches)
    shown = {row for batch in stage.batches for segment in batch.segments for row in segment.rows}
    assert len(shown) == 4 and (stage.mismatched > 0) == (objective == "kto")


def test_tokens_are_the_templates_and_the_answer_is_what_is_trained(rows, look, tokenizer):
    stage = look(rows, rows=4)
    given = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(stage.rows) == 4
    for row in stage.rows:
        assert (row.file, row.row) == (str(rows), row.line)
        (part,) = row.parts
        asked = given[row.line - 1]
        turns = [{"role": "user", "content": asked["prompt"]}, {"role": "assistant", "content": asked["completion"]}]
        assert text_of(part.tokens) == tokenizer.apply_chat_template(turns, tokenize=False)
        assert text_of([s for s in part.tokens if s.trained]) == asked["completion"] + "<|im_end|>"
        segment = next(s for b in stage.batches for s in b.segments if s.name == "row" and s.rows == (row.row,))
        assert segment.trained == part.trained


def test_a_shared_beginning_is_one_stretch_for_its_rows(tmp_path, look):
    data = write(
        tmp_path / "same.jsonl", [{"prompt": LONG + w, "completion": f"a {w}"} for w in ("cat", "dog", "owl", "elk")]
    )
    (batch,) = look(data).batches
    first, *others = batch.segments
    assert first.name == "beginning" and sorted(first.rows) == [1, 2, 3, 4] and first.trained == 0
    assert all(s.parent == 0 and s.name == "row" and len(s.rows) == 1 for s in others) and len(others) == 4
    assert batch.tokens - batch.computed == 3 * first.tokens
    (batch,) = look(data, share_prefix=False).batches
    assert batch.tokens == batch.computed and {s.name for s in batch.segments} == {"row"}


def test_both_answers_of_a_pair_stand_behind_its_prompt(tmp_path, look):
    stage = look(write(tmp_path / "pairs.jsonl", pairs()), objective="dpo", rows=1)
    for batch in stage.batches:
        for segment in batch.segments:
            if segment.name in ("chosen", "rejected"):
                prompt = batch.segments[segment.parent]
                assert prompt.name == "prompt" and prompt.rows == segment.rows and segment.trained
    (row,) = stage.rows
    given = pairs()[row.line - 1]
    names = {part.name: text_of([s for s in part.tokens if s.trained]) for part in row.parts}
    assert names == {"prompt": "", **{key: given[key] + "<|im_end|>" for key in ("chosen", "rejected")}}


def test_a_prompt_that_is_trained_is_shown_so(tmp_path, look):
    data = write(tmp_path / "pairs.jsonl", pairs()[:1])
    stage = look(data, objective={"name": "orpo", "nll": "prompt_and_answer"})
    prompt, chosen, rejected = stage.rows[0].parts
    assert prompt.trained == len(prompt.ids) - 1
    assert [s.trained for s in stage.batches[0].segments] == [prompt.trained, chosen.trained, rejected.trained]
    assert look(data, objective="orpo").rows[0].parts[0].trained == 0


def test_judged_answers_are_called_by_their_judgement(tmp_path, look):
    data = thumbs()
    stage = look(write(tmp_path / "thumbs.jsonl", data), objective="kto", rows=4)
    for row in stage.rows:
        assert row.parts[1].name == ("desirable" if data[row.line - 1]["label"] else "undesirable")


@pytest.mark.parametrize("objective", ["sft", "dpo", "kto"])
def test_what_max_length_cuts_is_shown_at_its_place(objective, tmp_path, look):
    answers = {"completion": "a"} if objective == "sft" else {"chosen": "a", "rejected": "b"}
    short = {"prompt": "Who?", **answers}
    long = {"sft": {"completion": LONG * 2}, "dpo": {"chosen": LONG * 2}, "kto": {"rejected": LONG * 2}}[objective]
    data = write(tmp_path / "long.jsonl", [short | long, {**short, "prompt": "And who?"}])
    whole, cut = (look(data, rows=9, objective=objective, max_length=n) for n in (500, 60))
    assert cut.counts["truncated"] == 1 and whole.counts["truncated"] == 0
    uncut = {(row.row, part.name): text_of(part.tokens) for row in whole.rows for part in row.parts}
    lost = []
    for row in cut.rows:
        for part in row.parts:
            assert text_of(part.tokens) + text_of(part.cut) == uncut[row.row, part.name]
            lost += [len(part.ids) + len(row.parts[0].ids) * (objective != "sft")] if part.cut else []
    assert lost == [60]


def test_a_row_is_shown_in_the_step_that_has_it(rows, look):
    for row in (1, 17, 40):
        stage = look(rows, row=row, max_steps=40)
        assert [shown.row for shown in stage.rows] == [row]
        assert row in {r for batch in stage.batches for segment in batch.segments for r in segment.rows}
    assert len({look(rows, row=row, max_steps=40).step for row in range(1, 8)}) > 1
    with pytest.raises(BadInput, match="no such row") as caught:
        look(rows, row=41)
    assert caught.value.problems[0].allowed == "1 to 40"


def test_a_row_that_no_step_has_is_shown_without_one(rows, look):
    stages = [look(rows, row=row, max_steps=1) for row in range(1, 41)]
    assert sum(stage.step == 1 for stage in stages) == 4
    assert all(stage.batches == () and len(stage.rows) == 1 for stage in stages if stage.step is None)


def test_the_page_holds_everything_and_runs_nothing_of_the_data(tmp_path, tiny_llama):
    data = write(tmp_path / "x.jsonl", [{"prompt": "<script>alert(1)</script>", "completion": 'a "<b>" & c'}] * 3)
    stages = preview(tiny_recipe(tiny_llama, data, tmp_path / "run"), Silent())
    page = as_page("x.jsonl", "tiny", stages)
    assert "<script" not in page and "&lt;" in page
    assert not re.findall(r"(?:src|href)=|url\(|@import", page)
    tokens = page.split('class="tokens">')[1].split("</p>")[0]
    assert "alert(1)" in re.sub(r"<[^>]+>", "", tokens).replace("\n", "")
    ids = [int(i) for span in re.findall(r'title="([\d ]+)"', tokens) for i in span.split()]
    assert ids == stages[0].rows[0].parts[0].ids


def test_the_page_names_the_stretches_that_an_answer_sees(tmp_path, tiny_llama):
    common = "the words that all of these prompts begin with are many and long enough "
    rows = [{"prompt": f"{common}{n}", "chosen": f"yes {n}", "rejected": "no"} for n in range(8)]
    data = write(tmp_path / "pairs.jsonl", rows)
    stages = preview(tiny_recipe(tiny_llama, data, tmp_path / "run", objective="dpo", max_steps=1), Silent())
    page = as_page("pairs.jsonl", "tiny", stages)
    seen = set(re.findall(r'<td class="sees muted">([^<]+)</td>', page))
    assert seen == {"itself", "itself, the beginning", "itself, the prompt, the beginning"}


def test_text_for_a_terminal_marks_what_is_trained(rows, tiny_llama, tmp_path):
    shown = shown_text(tiny_recipe(tiny_llama, rows, tmp_path / "run"))
    assert re.search(r"\[\[a \w+ with \d parts<\|im_end\|>\]\]", shown)
    assert "micro-batch 1" in shown and f"{rows}:" in shown and re.search(r"ids 1 \d+", shown)
