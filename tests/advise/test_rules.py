"""The table of rules, cell by cell: each fires where its cells say and nowhere else, and one always does."""

import re
import runpy

import pytest

from shikomi.advise import guide
from shikomi.advise.facts import AMOUNTS, COLUMNS, ENOUGH, LEVELS, NO, TASKS, YES, amount
from shikomi.advise.outcomes import NOT_BUILT, OUTCOMES
from shikomi.advise.rules import ADAPTERS, PREFERENCES, TABLE, unanswered, walk

ABOVE = ("trained", "copies", "reads")
NOTHING = dict.fromkeys(LEVELS, "none")
CASE = {
    **NOTHING,
    "family": "chatbot",
    "prompt": NO,
    "knowledge": NO,
    "understands": NO,
    "checkable": NO,
    "longer": NO,
    "room": "lora",
}


def way(**facts):
    return walk((CASE | facts).__getitem__)


def outcomes(**facts):
    return way(**facts).outcomes


def fired(**facts):
    return [fired.rule.name for fired in way(**facts).fired]


def test_the_table_holds_together():
    names = [rule.name for question in TABLE.values() for rule in question.rules]
    assert len(names) == len(set(names))
    for question in TABLE.values():
        for rule in question.rules:
            assert rule.then is None or rule.then in TABLE
            assert rule.adds is None or rule.adds in {*OUTCOMES, "sft"}
            assert rule.why and not rule.why.endswith(".")
            for column, cell in rule.when.items():
                assert cell and set(cell) <= set(COLUMNS[column].values), (rule.name, column)
    for outcome in OUTCOMES.values():
        assert {other for other, _ in outcome.others} <= set(OUTCOMES)
        assert len(outcome.others) >= 2 and 0 <= outcome.usual[0] <= outcome.usual[1]


def every_case():
    """Facts of every way through the table; of text, thumbs and kinds of tasks one value of each that are alike."""
    short = {"text": ("none", "few", "many"), "thumbs": ("none", "few", "many"), "room": ("full", "qlora", NO)}
    short["family"] = ("chatbot", "classification", "code")
    waiting = [{}]
    while waiting:
        facts = waiting.pop()
        try:
            walk(facts.__getitem__)
        except KeyError as error:
            (column,) = error.args
            waiting += [{**facts, column: value} for value in short.get(column, COLUMNS[column].values)]
        else:
            yield facts


def test_every_case_has_an_outcome_and_every_rule_is_reached():
    seen, found = set(), set()
    for facts in every_case():
        gone = walk(facts.__getitem__)
        assert gone.outcomes, facts
        assert (gone.adapter is None) == (gone.outcomes in (("prompt",), ("few-shot",)))
        assert len(set(gone.outcomes)) == len(gone.outcomes) <= 3
        stages = [name in PREFERENCES for name in gone.outcomes]
        assert stages == sorted(stages), "preferences are learned last"
        seen |= {one.rule.name for one in gone.fired}
        found |= set(gone.outcomes)
    assert seen == {rule.name for question in TABLE.values() for rule in question.rules}
    assert found == set(OUTCOMES)


def cells():
    for name, question in TABLE.items():
        for rule in question.rules:
            for column in rule.when:
                yield pytest.param(name, rule, column, id=f"{rule.name}-{column}")


@pytest.mark.parametrize("question, rule, column", list(cells()))
def test_a_cell_decides(question, rule, column):
    """Some case fires the rule, and it no longer does once this one fact has a value outside of the cell."""
    for facts in CASES:
        gone = walk(facts.__getitem__)
        if rule not in [one.rule for one in gone.fired]:
            continue
        assert column in ABOVE or facts[column] in rule.when[column]
        others = [value for value in COLUMNS[column].values if value not in rule.when[column]]
        if column in ABOVE:
            assert others  # a rule above decides it: test_what_a_rule_above_trained_decides
            return
        for value in others:
            assert rule not in [one.rule for one in walk((facts | {column: value}).__getitem__).fired]
        return
    pytest.fail("no case fires it")


CASES = [
    CASE | change
    for change in (
        {"prompt": "zero-shot"},
        {"prompt": "few-shot"},
        {},
        {"rows": "too few"},
        {"text": "few"},
        {"text": "many", "room": "full"},
        {"rows": "few", "text": "few", "knowledge": YES},
        {"rows": "few", "knowledge": YES},
        {"pairs": "few", "knowledge": YES},
        {"rows": "medium"},
        {"pairs": "few"},
        {"thumbs": "few"},
        {"rows": "few", "understands": YES},
        {"rows": "few", "family": "classification"},
        {"rows": "few", "family": "classification", "understands": YES},
        {"pairs": "many", "understands": YES},
        {"pairs": "medium", "understands": YES, "longer": YES},
        {"pairs": "few", "understands": YES},
        {"pairs": "medium", "understands": YES},
        {"thumbs": "many", "understands": YES},
        {"thumbs": "medium", "understands": YES},
        {"rows": "few", "family": "code", "checkable": YES, "understands": YES},
        {"rows": "many", "room": "full"},
        {"rows": "few", "room": NO},
        {"rows": "few", "room": "qlora"},
        {"rows": "few", "family": "code"},
    )
]


def test_what_a_rule_above_trained_decides():
    labels = {"family": "classification", "rows": "few"}
    assert "labels-are-learned" in fired(**labels) and "labels-to-copy" in fired(**labels, understands=YES)
    assert "no-judgements" in fired(rows="few") and "answers-to-copy" in fired(rows="few", understands=YES)
    assert way(rows="many", room="full").adapter == "full"
    # many rows that nothing copies: the pairs are what is learned
    assert way(rows="many", room="full", pairs="medium", understands=YES).adapter == "lora"
    assert way(text="many", room="full").adapter == "full"
    assert way(text="many", room="full", rows="few").adapter == "lora"  # known domain: the text is not read


@pytest.mark.parametrize(
    "facts, expected",
    [
        ({"prompt": "zero-shot", "rows": "many"}, ("prompt",)),
        ({"prompt": "few-shot", "rows": "many"}, ("few-shot",)),
        ({}, ("prompt",)),
        ({"rows": "too few", "pairs": "too few"}, ("few-shot",)),
        ({"rows": "few"}, ("lora",)),
        ({"rows": "few", "room": "qlora"}, ("qlora",)),
        ({"rows": "many", "room": "full"}, ("full",)),
        ({"rows": "many", "room": "lora"}, ("lora",)),
        ({"text": "few"}, ("pretrain",)),
        ({"rows": "medium", "pairs": "medium", "text": "medium", "knowledge": YES}, ("pretrain", "lora", "dpo")),
        ({"rows": "medium", "pairs": "medium", "knowledge": YES}, ("pretrain", "dpo")),
        ({"pairs": "medium"}, ("orpo",)),
        ({"thumbs": "medium"}, ("kto",)),
        ({"rows": "medium", "pairs": "medium"}, ("lora", "dpo")),
        ({"rows": "medium", "pairs": "few"}, ("lora", "ipo")),
        ({"pairs": "medium", "understands": YES}, ("dpo",)),
        ({"pairs": "medium", "thumbs": "medium", "understands": YES}, ("dpo",)),
        ({"pairs": "medium", "understands": YES, "longer": YES}, ("simpo",)),
        ({"thumbs": "few", "understands": YES}, ("kto",)),
        ({"pairs": "many", "understands": YES}, ("rlhf",)),
        ({"rows": "medium", "understands": YES}, ("lora",)),
    ],
)
def test_outcomes(facts, expected):
    assert outcomes(**facts) == expected


@pytest.mark.parametrize(
    "family, facts, path",
    [
        ("chatbot", {"rows": "medium", "pairs": "medium"}, ("lora", "dpo")),
        ("classification", {"rows": "medium", "pairs": "medium"}, ("lora",)),
        ("code", {"rows": "medium"}, ("qlora", "rlhf")),
        ("code", {"rows": "medium", "pairs": "medium"}, ("qlora", "dpo")),
        ("summarisation", {"rows": "medium", "pairs": "medium"}, ("dpo",)),
    ],
)
def test_a_family_goes_its_usual_path(family, facts, path):
    assert outcomes(**TASKS[family].assumed, family=family, **facts) == path
    assert outcomes(family=family, prompt="zero-shot", **facts) == ("prompt",), "each begins with a prompt"


def test_amounts_begin_where_the_thresholds_say():
    for kind, levels in LEVELS.items():
        assert 0 < levels.few < levels.medium < levels.many
        bounds = (0, 1, levels.few, levels.medium, levels.many)
        assert tuple(amount(kind, bound) for bound in bounds) == AMOUNTS
        assert [amount(kind, bound - 1) for bound in bounds[2:]] == list(AMOUNTS[1:4])
    assert ENOUGH == AMOUNTS[2:]


def test_only_what_can_matter_is_asked():
    assert "understands" in unanswered({**NOTHING, "rows": "few", "prompt": NO})
    assert "checkable" in unanswered({**NOTHING, "rows": "few", "family": "code", "prompt": NO})
    assert "checkable" not in unanswered({**NOTHING, "rows": "few", "family": "chatbot", "prompt": NO})
    assert "understands" not in unanswered({**NOTHING, "text": "few", "prompt": NO})
    assert unanswered({**NOTHING, "prompt": "zero-shot"}) == []
    assert unanswered({k: v for k, v in CASE.items() if k != "prompt"}) == ["prompt"]


def test_the_page_shows_every_rule_and_every_way(repository):
    page = guide.page()
    tree = page.split("```mermaid")[1].split("```")[0]
    edges = re.findall(r'^  (\w+) -- "[^"]+" --> (\w+)$', tree, re.M)
    assert len(edges) == sum(len(question.rules) for question in TABLE.values())
    nodes = set(re.findall(r"^  (\w+)[{\[]", tree, re.M))
    assert {end for edge in edges for end in edge} == nodes
    for name, question in TABLE.items():
        table = page.split(f"### {question.text}\n")[1].split("\n##")[0]
        assert [row for row in re.findall(r"^\| `([\w-]+)`", table, re.M)] == [rule.name for rule in question.rules]
        assert f'{name}{{"{question.text}"}}' in tree
    for levels in LEVELS.values():
        assert f"{levels.few:,} | {levels.why_few} | {levels.medium:,}" in page
    pages = runpy.run_path(str(repository / "docs" / "generate.py"))["PAGES"]
    assert pages["advise.md"]() == page == (repository / "docs/guide/advise.md").read_text(), "python docs/generate.py"


def test_what_is_not_built_is_said():
    from shikomi import registry

    built = set(registry.names("objectives"))
    assert not {"ppo", "grpo"} & built, "RL is built now: NOT_BUILT is out of date"
    assert set(PREFERENCES) - set(NOT_BUILT) <= built
    assert set(NOT_BUILT) <= set(OUTCOMES) and set(ADAPTERS) <= set(OUTCOMES)
