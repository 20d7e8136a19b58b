"""Advice: what the data, flags and measurements answer, what is left to ask, and drafts that run as they are."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from preference_rows import pairs, thumbs, write
from running import WORDS

from shikomi.advise.advice import Answer, Case, advise, band, known_answers, titles
from shikomi.advise.drafts import plain_prompt, prompt_draft, recipe_draft
from shikomi.advise.expected import Expecting, loadable
from shikomi.advise.facts import TASKS
from shikomi.advise.material import Materials, materials
from shikomi.advise.outcomes import NOT_BUILT, OUTCOMES
from shikomi.advise.prompting import Measured, chosen_shots, measure_prompt
from shikomi.advise.rules import ADAPTERS
from shikomi.errors import BadInput
from shikomi.evaluate.prompts import load_prompt, prompted
from shikomi.inference import open_model
from shikomi.recipe import parse_recipe

ROOMY, NARROW = (lambda method: True), (lambda method: method == "qlora")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of every kind of data."""
    made = tmp_path_factory.mktemp("data")
    write(made / "answers.jsonl", [{"prompt": f"what is a {WORDS[i % 9]}", "completion": f"no {i}"} for i in range(60)])
    write(made / "labels.jsonl", [{"text": f"{WORDS[i % 9]} {i}", "label": f"l{i % 3}"} for i in range(60)])
    write(made / "summary.jsonl", [{"text": f"{WORDS[i % 9]} " * 9 + str(i), "summary": f"s {i}"} for i in range(60)])
    write(made / "pairs.jsonl", pairs(60))
    write(made / "thumbs.jsonl", thumbs(120))
    write(made / "text.jsonl", [{"text": " ".join(WORDS) * 10 + str(i)} for i in range(80)])
    return made


FILES = {"chatbot": "answers", "code": "answers", "classification": "labels", "summarisation": "summary"}


def given(folder, family, *kinds):
    files = {"rows": FILES[family], "pairs": "pairs", "thumbs": "thumbs", "text": "text"}
    return materials([(kind, str(folder / f"{files[kind]}.jsonl")) for kind in kinds])


def answered(**values):
    return {column: Answer(value, "given") for column, value in values.items()}


def case(there, **values):
    return Case("smollm2", there, answered(**({"prompt": "no", "knowledge": "no", "understands": "no"} | values)))


def test_files_are_taken_as_what_they_are(folder):
    found = given(folder, "chatbot", "rows", "pairs", "thumbs", "text")
    assert {k: (m.count, m.amount) for k, m in found.by_kind.items()} == {
        "rows": (60, "few"),
        "pairs": (60, "few"),
        "thumbs": (120, "few"),
        "text": (found.get("text").count, "few"),
    }
    assert found.get("text").count == pytest.approx(80 * (10 * (sum(map(len, WORDS)) + 9)) / 4, rel=0.02)
    assert materials([("rows", str(folder / "pairs.jsonl"))]).get("pairs").count == 60, "under --data too"
    counts = materials([("rows", "1,000"), ("text", "5")])
    assert (counts.get("rows").amount, counts.get("text").amount, counts.amount("pairs")) == (
        "medium",
        "too few",
        "none",
    )


@pytest.mark.parametrize(
    "kind, file, message",
    [
        ("pairs", "answers", "--pairs: the file holds rows.*fix: --data"),
        ("thumbs", "pairs", "--thumbs: the file holds pairs.*fix: --pairs"),
        ("rows", "missing", "no such file"),
    ],
)
def test_a_file_of_another_kind_is_refused(kind, file, message, folder):
    with pytest.raises(BadInput, match=message):
        materials([(kind, str(folder / f"{file}.jsonl"))])
    with pytest.raises(BadInput, match="neither a file nor a count"):
        materials([("pairs", "-3")])
    with pytest.raises(BadInput, match="given twice"):
        materials([("pairs", "30"), ("rows", str(folder / "pairs.jsonl"))])


def test_longer_chosen_answers_are_counted(tmp_path):
    rows = [{"prompt": f"q{i}", "chosen": "long " * (5 if i % 10 else 1), "rejected": "word word"} for i in range(60)]
    found = materials([("pairs", str(write(tmp_path / "p.jsonl", rows)))])
    assert found.get("pairs").longer == "yes"
    assert advise(case(found, understands="yes", family="chatbot"), ROOMY).outcomes == ("simpo",)
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    assert materials([("pairs", str(write(tmp_path / "s.jsonl", swapped)))]).get("pairs").longer == "no"


def test_the_data_shows_the_kind_of_task(folder):
    for family, expected in (("classification",) * 2, ("summarisation",) * 2, ("chatbot", None)):
        found = known_answers(Case("m", given(folder, family, "rows"))).get("family")
        assert (found.value if found else None) == expected
    told = Case("m", given(folder, "classification", "rows"), answered(family="code"))
    assert known_answers(told)["family"] == Answer("code", "given")


def test_without_answers_the_flags_are_named(folder):
    with pytest.raises(BadInput) as caught:
        advise(Case("m", given(folder, "chatbot", "rows")), ROOMY)
    text = str(caught.value)
    assert len(caught.value.problems) == len({problem.fix for problem in caught.value.problems})
    for flag in ("--task", "--prompt-solves", "--new-knowledge", "--understands", "--checkable", "--yes"):
        assert flag in text
    with pytest.raises(BadInput) as caught:
        advise(Case("m", given(folder, "classification", "rows"), answered(prompt="no", knowledge="no")), ROOMY)
    assert [problem.fix for problem in caught.value.problems] == [
        "--understands or --no-understands, or take stated defaults with --yes"
    ]


def test_defaults_are_stated_and_questions_are_only_what_matters(folder):
    made = advise(Case("m", given(folder, "classification", "rows")), ROOMY, assume=True)
    assert {
        c: a.source for c, a in made.answers.items() if c in ("prompt", "knowledge", "understands")
    } == dict.fromkeys(("prompt", "knowledge", "understands"), "assumed")
    assert any("assumed" in fact for reason in made.reasons for fact in reason.facts)
    asked = []

    def ask(column):
        asked.append(column)
        return Answer({"prompt": "zero-shot"}.get(column, "no"), "asked")

    made = advise(Case("m", given(folder, "classification", "rows")), ROOMY, ask)
    assert made.outcomes == ("prompt",) and asked == ["prompt"]


def test_room_is_asked_only_where_it_matters(folder):
    tried = []

    def fits(method):
        tried.append(method)
        return method != "full"

    assert advise(case(given(folder, "classification", "rows")), fits).adapter == "lora" and tried == ["lora"]
    many = materials([("rows", "200000")])
    assert advise(case(many, family="chatbot"), fits).adapter == "lora" and tried[1:] == ["lora", "full"]
    assert advise(case(many, family="chatbot"), ROOMY).adapter == "full"
    assert advise(case(many, family="chatbot"), NARROW).adapter == "qlora"
    nothing = advise(case(many, family="chatbot"), lambda method: False)
    assert nothing.adapter == "qlora" and nothing.reasons[-1].rule.name == "nothing-fits"


def test_advice_says_what_else_would_win_and_what_it_usually_costs(folder):
    made = advise(case(given(folder, "chatbot", "rows", "pairs"), family="chatbot"), ROOMY)
    assert made.outcomes == ("lora", "ipo") and made.title == "LoRA, then IPO (LoRA)"
    assert band(made.outcomes) == "$110-1,100" and band(("prompt",)) == "$0"
    others = [name for name, _ in made.alternatives]
    assert len(others) == len(set(others)) >= 3 and not set(others) & set(made.outcomes)
    printed = made.as_dict(None)
    assert printed["outcome"] == "lora" and printed["then"] == ["ipo"] and "recipe" in printed
    assert json.loads(json.dumps(printed)) == printed


def test_what_is_not_built_is_said_and_something_runs(folder):
    made = advise(case(given(folder, "code", "rows"), family="code", checkable="yes"), ROOMY)
    assert made.outcomes == ("qlora", "rlhf") and not made.as_dict(None)["built"]
    assert "not built yet" in made.notes[0] and "QLoRA" in made.notes[0] and "not built yet" in made.draft.text
    recipe = parse_recipe(made.draft.text)
    assert [s.objective.name for s in recipe.stages] == ["sft"] and recipe.quant.name == "nf4"
    many = advise(case(materials([("pairs", "50000")]), understands="yes", family="chatbot"), ROOMY)
    assert many.outcomes == ("rlhf",) and parse_recipe(many.draft.text).stages[0].objective.name == "dpo"


def test_files_that_are_not_there_yet_are_said():
    made = advise(case(materials([("rows", "900"), ("pairs", "900")]), family="chatbot"), ROOMY)
    assert [note.partition(" ")[0] for note in made.notes] == ["rows.jsonl", "pairs.jsonl"]
    recipe = parse_recipe(made.draft.text)
    assert [s.name for s in recipe.stages] == ["sft", "dpo"]


RUNS: dict[str, bool] = {}
"""Recipes that ran already in this session: kinds of tasks that share their rows share them."""


@pytest.mark.parametrize("family", TASKS)
@pytest.mark.parametrize("outcome", OUTCOMES)
def test_every_outcome_of_every_kind_of_task_runs(outcome, family, folder, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SHIKOMI_CACHE", str(tmp_path / "cache"))
    there = given(folder, family, "rows", "pairs", "thumbs", "text")
    if outcome in ("prompt", "few-shot"):
        file = plain_prompt(family, there, str(tiny_llama))
        if outcome == "few-shot":
            file = chosen_shots(file, there.get("rows").path)
            assert len(file.shots) == 5
        use_prompt(prompt_draft(file, "h").text, file, there, tmp_path)
        return
    adapter = outcome if outcome in ADAPTERS else "qlora" if (outcome, family) == ("dpo", "code") else "lora"
    draft = recipe_draft((outcome,), adapter, there, str(tiny_llama), OUTCOMES[outcome].title)
    recipe = parse_recipe(draft.text)
    expected = {"rlhf": "dpo", "pretrain": "sft"}.get(outcome, "sft" if outcome in ADAPTERS else outcome)
    assert [s.objective.name for s in recipe.stages] == [expected]
    assert (recipe.adapter.name == "full", recipe.quant.name == "nf4") == (adapter == "full", adapter == "qlora")
    run_once(draft.text, tmp_path)


def test_many_stages_run_in_one_recipe(folder, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("SHIKOMI_CACHE", str(tmp_path / "cache"))
    there = given(folder, "classification", "rows", "pairs", "text")
    for adapter in ("lora", "full"):
        draft = recipe_draft(("pretrain", adapter, "dpo"), adapter, there, str(tiny_llama))
        recipe = parse_recipe(draft.text)
        assert [s.name for s in recipe.stages] == ["pretrain", "sft", "dpo"]
        assert recipe.stages[0].learning_rate < recipe.stages[1].learning_rate
        assert recipe.data_of(recipe.stages[1]).prompt is not None
        values = run_once(draft.text, tmp_path / adapter)
        assert [stage["name"] for stage in values["stages"]] == ["pretrain", "sft", "dpo"]
        full = (tmp_path / adapter / "run" / "final" / "model.safetensors").exists()
        assert full == (adapter == "full")
    from_rows = recipe_draft(
        ("pretrain", "dpo"), "lora", given(folder, "summarisation", "rows", "pairs"), str(tiny_llama)
    )
    recipe = parse_recipe(from_rows.text)
    assert recipe.data_of(recipe.stages[0]).train_on == "everything"
    assert recipe.data_of(recipe.stages[1]).train[0].path.endswith("pairs.jsonl")


def run_once(text, place):
    """One step of every stage, on the very text but for lengths and folders."""
    from shikomi.run import train

    overrides = ["max_steps=1", "dtype=fp32", "max_length=256", "evaluate=null", "batch_size=4", "num_train_epochs=1"]
    recipe = parse_recipe(text, "advised", overrides)
    known = recipe.model_copy(update={"output_dir": Path("x")}).model_dump_json()
    if known in RUNS:
        return None
    RUNS[known] = True
    values = train(recipe.model_copy(update={"output_dir": place / "run"})).values
    assert values["steps"] == len(recipe.stages) and values["final_loss"] > 0
    return values


def use_prompt(text, file, there, place):
    path = place / "prompt.yaml"
    path.write_text(text)
    assert load_prompt(path).file == file
    some = place / "some.jsonl"
    some.write_text("\n".join(open(there.get("rows").path).read().splitlines()[:2]) + "\n")
    answers = list(open_model(path, dtype="fp32").predict(some, max_new_tokens=2))
    assert len(answers) == 2 and all("prediction" in row for row in answers)


def test_a_prompt_is_measured_as_it_is_written(folder, tiny_llama):
    there = given(folder, "classification", "rows")
    ready = open_model(tiny_llama, dtype="fp32")
    file = plain_prompt("classification", there, str(tiny_llama))
    rows = there.get("rows").path
    found = measure_prompt(ready.lm, ready.encoder, file, rows, sample=12, shots=3, seed=1)
    assert (found.metric, found.target, found.n) == ("accuracy", 0.9, 12)
    held = [json.loads(line) for line in open(rows)]
    assert len(found.file.shots) == 3 and len({shot["label"] for shot in found.file.shots}) == 3
    assert all(set(shot) == {"text", "label"} and shot in held for shot in found.file.shots)
    # What Ready scores with the written prompt on the same rows is what was measured.
    shown = {shot["text"] for shot in found.file.shots}
    again = replace(ready, prompted=prompted(found.file))
    assert 0 <= found.few_shot["value"] <= 1 and again.generate(held[0]["text"]) in file.labels
    assert found.prompt == "no" and found.understands in ("yes", "no") and shown
    easy = measure_prompt(ready.lm, ready.encoder, file, rows, sample=12, shots=3, seed=1, target=0.0)
    assert easy.prompt == "zero-shot"
    measured = advise(Case("m", there, answered(knowledge="no", understands="no"), found), ROOMY)
    assert measured.outcomes == ("lora",) and "12 rows" in measured.reasons[0].facts[0]


def test_the_best_of_several_sets_of_shots_is_scored_on_other_rows(folder, tiny_llama, monkeypatch):
    there = given(folder, "classification", "rows")
    ready = open_model(tiny_llama, dtype="fp32")
    from shikomi.advise import prompting

    calls = []
    score = prompting._score

    def spy(lm, task, one, progress, what):
        done = score(lm, task, one, progress, what)
        calls.append((what, one[0].shots, task.rows, done.measurements["accuracy"]["value"]))
        return done

    monkeypatch.setattr(prompting, "_score", spy)
    file = plain_prompt("classification", there, str(tiny_llama))
    found = measure_prompt(ready.lm, ready.encoder, file, there.get("rows").path, sample=16, shots=3, tries=3)
    choosing, scoring = [c for c in calls if "try" in c[0]], [c for c in calls if "try" not in c[0]]
    assert len(choosing) == 3 and len({str(c[1]) for c in choosing}) == 3 and found.n == 8
    assert found.notes[0] == "of 3 sets of examples the best on 8 rows; scored on 8 others"
    assert found.file.shots == max(choosing, key=lambda c: c[3])[1]
    for _, _, rows, _ in choosing:
        assert not {id(row) for row in rows} & {id(row) for row in scoring[0][2]}


def test_the_prompt_that_was_measured_is_the_one_that_is_written(folder):
    there = given(folder, "classification", "rows")
    file = replace(plain_prompt("classification", there, "m"), shots=({"text": "measured", "label": "l1"},))
    score = {"value": 0.95, "ci95": (0.9, 1.0), "n": 20}
    measured = Measured("accuracy", 0.9, 20, score | {"value": 0.5}, score, "yes", file)
    made = advise(Case("m", there, answered(knowledge="no"), measured), ROOMY)
    assert made.outcomes == ("few-shot",) and "measured" in made.draft.text and not made.draft.notes
    (note,) = prompt_draft(plain_prompt("chatbot", Materials(), "m")).notes
    assert "no examples yet" in note


@pytest.mark.parametrize("low, expected", [(0.41, "yes"), (0.39, "no")])
def test_a_model_understands_what_it_clearly_does_better_than_the_most_frequent_label(low, expected):
    from shikomi.advise.prompting import _understands

    class Labels:
        def references(self):
            return ["a", "a", "b", "c", "d"]

    scores = [{"value": 0.5, "ci95": (interval, 0.9), "n": 5} for interval in (0.1, low)]
    assert _understands(scores, Labels()) == expected


def test_preferences_have_betas_and_rates_of_their_own(folder):
    there = given(folder, "chatbot", "pairs", "thumbs")

    def stage(objective, adapter):
        (found,) = parse_recipe(recipe_draft((objective,), adapter, there, "m").text).stages
        return found

    betas = {name: stage(name, "lora").objective.options["beta"] for name in ("dpo", "ipo", "orpo", "kto", "simpo")}
    assert betas == {"dpo": 0.1, "ipo": 0.1, "orpo": 0.1, "kto": 0.1, "simpo": 2.0}
    assert stage("dpo", "lora").learning_rate == 5e-5 and stage("orpo", "lora").learning_rate == 1e-4
    assert stage("dpo", "full").learning_rate == pytest.approx(5e-6)


def test_a_test_file_beside_the_rows_is_used(examples):
    rows = str(examples / "sections/train.jsonl")
    recipe = parse_recipe(recipe_draft(("lora",), "lora", materials([("rows", rows)]), "m").text)
    assert [source.path for source in recipe.data.test] == [str(examples / "sections/test.jsonl")]


def test_the_plan_says_what_fits_and_what_it_costs(folder, tiny_llama):
    there = given(folder, "classification", "rows")
    small = Expecting("rtx-4090", "JPY").of(recipe_draft(("lora",), "lora", there, "qwen3-8b"))
    assert small.currency == "JPY" and small.cost.low <= small.cost.likely <= small.cost.high
    assert small.seconds.likely > 0 and 15e9 < small.peak_memory.likely
    fits = Expecting("rtx-4060-ti-16gb").room(Case("qwen3-8b", there))
    assert not fits("lora") and fits("qlora")
    assert not Expecting("rtx-4090").room(Case("qwen3-8b", there))("full")
    assert not Expecting("rtx-4090", budget=0.0).room(Case("qwen3-8b", there))("lora"), "no money"
    dear = Expecting("rtx-4090", price=1000.0).of(recipe_draft(("lora",), "lora", there, "qwen3-8b"))
    assert dear.cost.likely == pytest.approx(1000 * dear.seconds.likely / 3600)
    counts = materials([("rows", "2000")])
    later = Expecting("rtx-4090").of(recipe_draft(("lora",), "lora", counts, "qwen3-8b"))
    assert later.seconds.likely > small.seconds.likely and any("not there yet" in note for note in later.notes)
    assert loadable("qwen3-8b") == "Qwen/Qwen3-8B" and loadable("smollm2") == "smollm2"
    assert Expecting("rtx-4090").of(recipe_draft(("lora",), "lora", counts, loadable("qwen3-8b"))) == later
    unknown = Expecting("rtx-4090").of(recipe_draft(("lora",), "lora", there, "owner/nobody-knows"))
    assert unknown.seconds is None and unknown.fits and unknown.notes and unknown.memory == 0
    assert unknown.as_dict()["cost"] is None and dear.as_dict()["cost"] == dear.cost.as_dict()
    assert Expecting().of(prompt_draft(plain_prompt("code", Materials(), "m"))) is None
    with pytest.raises(BadInput, match="unknown machine"):
        Expecting("rtx-409").check()
    with pytest.raises(BadInput, match="unknown currency"):
        Expecting(currency="YEN").check()


def test_titles_name_the_weights():
    assert titles(("pretrain", "full", "dpo"), "full") == [
        "continued pre-training (full fine-tuning)",
        "full fine-tuning",
        "DPO (full fine-tuning)",
    ]
    assert titles(("rlhf",), "lora") == [OUTCOMES["rlhf"].title] and set(NOT_BUILT) == {"rlhf"}
