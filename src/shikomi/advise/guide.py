"""The table of rules as a page of the guide: a decision tree, the rules as tables, thresholds, outcomes."""

from collections.abc import Iterator

from shikomi.advise.facts import COLUMNS, ENOUGH, LEVELS, SHORT, TASKS
from shikomi.advise.outcomes import NOT_BUILT, OUTCOMES
from shikomi.advise.rules import TABLE, Rule
from shikomi.evaluate.prompts import KEYS

HEAD = """# Which method

Written by `docs/generate.py` from the table that `shikomi advise` walks (src/shikomi/advise/rules.py).

```
shikomi advise                                              asks, on a terminal
shikomi advise --data my.jsonl --run-baseline -o my.yaml    measures what a prompt reaches, then advises and writes
shikomi advise --task chatbot --data 900 --pairs 400 --yes  before there are files: counts
shikomi advise --data my.jsonl --yes --json                 for a script
```

Answers come from flags, then from the data (labels show a classification; rows, pairs, thumbs and text are
counted), then from `--run-baseline`, then from questions. Without a terminal every open question is an error that
names its flag; `--yes` takes the defaults of the kind of task and says which. Only what can still change the
outcome is asked.

`--run-baseline` shows the untouched model a sample of the rows with the instruction, and with solved examples from
the other rows. What it measures is the prompt that is written: where it reaches the `--target` (accuracy 0.9, chrF
60) no training is advised. For labels it also tells whether the model understands the task: whether the best prompt
is clearly better than always giving the most frequent label.

Memory, time and cost in the answer are those of `shikomi plan` for the recipe that is written; `--machine`,
`--currency` and `--budget` go there too. What people usually quote stands beside them.

## The tree
"""

PROMPT = """
## prompt.yaml

Where a prompt is the outcome, `-o` writes one. `generate`, `predict`, `chat` and `eval` take it in the place of a
model:

```yaml
model: smollm2
system: Answer with the label alone.
prompt: "Which section does this package belong to? One of: {labels}.\\n\\n{text}"
completion: "{label}"
labels: [admin, games, net]
shots:
  - text: "a puzzle with levels"
    label: games
```

```
shikomi eval prompt.yaml test.jsonl
shikomi predict prompt.yaml new.jsonl -o answers.jsonl
shikomi chat prompt.yaml
```

Shots are rows like those of a data file and go through the same templates, so that a change of wording changes them
too. With labels they are drawn by the seed so that every label gives one before any gives a second; `--tries 8`
draws eight sets, keeps the one with the best score on half of the sample and reports its score on the other half.
In a chat, `/base` answers without instruction and shots.
"""


def page() -> str:
    """docs/guide/advise.md."""
    parts = [HEAD, "```mermaid", *_tree(), "```", "", "## The rules", ""]
    parts.append("In each question the first rule holds whose cells all hold; an empty cell holds always.")
    for name, question in TABLE.items():
        parts += ["", f"### {question.text}", "", *_rules(name)]
    parts += ["", "## Few, medium, many", "", *_thresholds(), "", "## Kinds of tasks", "", *_tasks()]
    parts += ["", "## Outcomes", "", *_outcomes(), PROMPT, *_keys()]
    return "\n".join(parts) + "\n"


def _tree() -> Iterator[str]:
    yield "flowchart TD"
    for name, question in TABLE.items():
        yield f'  {name}{{"{question.text}"}}'
    ends: dict[str, None] = {}
    for name, question in TABLE.items():
        for rule in question.rules:
            to = rule.then or _node(str(rule.adds))
            if rule.then is None:
                ends[str(rule.adds)] = None
            adds = f", train {title(rule.adds)}" if rule.adds is not None and rule.then is not None else ""
            yield f'  {name} -- "{_short(rule)}{adds}" --> {to}'
    for end in ends:
        yield f'  {_node(end)}["{title(end)}"]'


def _node(outcome: str) -> str:
    return f"do_{outcome}".replace("-", "_")


def title(name: str | None) -> str:
    """An outcome, or the supervised fine-tuning whose weights the last question chooses."""
    return "supervised fine-tuning" if name == "sft" else OUTCOMES[str(name)].title


def _short(rule: Rule) -> str:
    """The cells of a rule on an arrow."""
    cells = [f"{COLUMNS[column].about}: {_cell(column, cell)}" for column, cell in rule.when.items()]
    return "; ".join(cells).replace('"', "'") or "else"


def _cell(column: str, cell: tuple[str, ...]) -> str:
    if column in LEVELS and cell == ENOUGH:
        return "enough"
    if column in LEVELS and cell == SHORT:
        return "too few or none"
    return " or ".join(cell)


def _rules(name: str) -> Iterator[str]:
    rules = TABLE[name].rules
    columns = [column for column in COLUMNS if any(column in rule.when for rule in rules)]
    yield _line("rule", *(COLUMNS[column].about for column in columns), "trains", "then", "why")
    yield _line(*("---" for _ in range(len(columns) + 4)))
    for rule in rules:
        cells = [_cell(column, rule.when[column]) if column in rule.when else "" for column in columns]
        adds = title(rule.adds) if rule.adds is not None else ""
        yield _line(f"`{rule.name}`", *cells, adds, TABLE[rule.then].text if rule.then else "done", rule.why)


def _thresholds() -> Iterator[str]:
    yield _line("what", "few from", "because", "medium from", "because", "many from", "because")
    yield _line(*["---"] * 7)
    for levels in LEVELS.values():
        bounds = ((levels.few, levels.why_few), (levels.medium, levels.why_medium), (levels.many, levels.why_many))
        yield _line(levels.what, *(text for bound, why in bounds for text in (f"{bound:,}", why)))


def _tasks() -> Iterator[str]:
    asked = [name for name, column in COLUMNS.items() if column.ask is not None and name != "family"]
    yield _line("`--task`", "kind", "usual path", *(f"with `--yes`: {COLUMNS[name].about}" for name in asked))
    yield _line(*["---"] * (3 + len(asked)))
    for name, task in TASKS.items():
        yield _line(f"`{name}`", task.title, task.path, *(task.assumed[column] for column in asked))


def _outcomes() -> Iterator[str]:
    yield _line("outcome", "usually quoted, 7 billion parameters", "what would win instead, and when")
    yield _line(*["---"] * 3)
    for name, outcome in OUTCOMES.items():
        others = "; ".join(f"{OUTCOMES[other].title}: {when}" for other, when in outcome.others)
        built = f" ({NOT_BUILT[name]}: the nearest recipe that runs is written)" if name in NOT_BUILT else ""
        yield _line(outcome.title + built, outcome.band, others)


def _keys() -> Iterator[str]:
    yield _line("key", "meaning")
    yield _line("---", "---")
    for key, about in KEYS.items():
        yield _line(f"`{key}`", about)


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
