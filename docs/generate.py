"""Write the parts of the guide that the source already says: recipe keys, other tools' keys, numbers and errors.

python docs/generate.py          writes the pages of PAGES into docs/guide (tests compare them)
"""

from pathlib import Path
from typing import Any

from shikomi import registry
from shikomi.advise import guide
from shikomi.data.findings.codes import codes
from shikomi.evaluate.explanations import Explanation, explanations
from shikomi.recipe import component_reference, reference, translations

GUIDE = Path(__file__).resolve().parent / "guide"
KINDS = {"adapters": "adapter", "quant": "quant", "objectives": "objective", "optim": "optim", "metrics": "metric"}

RECIPE = """# Recipe reference

Written by `docs/generate.py` from the source; `shikomi recipe` prints the same.

A recipe is YAML or JSON. Only `model` and `data.train` must be given. Keys of a stage may stand at the top: they are
then the defaults of every stage, and a recipe without `stages` has one. Numbers may be written `1e-4`; a number in
quotes is text, and an error. Paths resolve against the folder in which the command runs. Any key can be changed on
the command line: `shikomi train my.yaml learning_rate=1e-4 adapter.r=32`. What the keys of TRL, PEFT, Axolotl and
LLaMA-Factory are called here: [other-tools.md](other-tools.md).
"""

OTHER = """# You know another tool

Written by `docs/generate.py` from the source. Blocks pasted from TRL, transformers, PEFT, Axolotl and LLaMA-Factory
are understood: each key that is called otherwise here is translated, and the run says how it was read. Keys that are
the same are not listed.
"""


METRICS = """# Numbers, findings, exit codes and errors

Written by `docs/generate.py` from `src/shikomi/evaluate/explanations.yaml` and `src/shikomi/data/findings/codes.yaml`;
`shikomi explain NAME` prints the same, and takes an error message in quotes. Before a number of metrics.jsonl `eval_`
means: on validation rows. The ranges are what is usual, not limits.
"""

GROUPS = {
    "training": "Training: metrics.jsonl",
    "preferences": "Preferences: metrics.jsonl",
    "evaluation": "Evaluation: result.json, test_outcomes.json",
    "run": "The run: result.json",
    "data": "The data report: result.json, `train --dry-run`",
    "exit codes": "Exit codes",
    "errors": "Errors",
}


def cell(value: Any) -> str:
    """A value as a Markdown cell; nothing for null."""
    if value is None or value == []:
        return ""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text.replace("|", "\\|")


def table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, tuple("---" for _ in head)]
    lines += [(f"`{row[0]}`", *(cell(value) for value in row[1:])) for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def recipe_page() -> str:
    parts = [RECIPE, table(("key", "type", "default", "meaning"), list(reference()))]
    for kind, key in KINDS.items():
        names = registry.names(kind)
        if not names:
            continue
        parts.append(f"\n## {key}: {', '.join(names)}")
        for name in names:
            options = component_reference(kind, name)
            if options:
                parts.append(f"\n### {name}\n\n" + table(("option", "type", "default", "meaning"), options))
    return "\n".join(parts) + "\n"


def other_tools_page() -> str:
    return OTHER + "\n" + table(("theirs", "here"), list(translations())) + "\n"


def metrics_page() -> str:
    parts = [METRICS]
    for group, title in GROUPS.items():
        entries = [entry for entry in explanations().values() if entry.group == group]
        parts.append(f"## {title}\n\n" + explained(entries, "healthy" if any(e.healthy for e in entries) else ""))
    head = ("code", "severity", "what it is", "healthy", "what to do")
    rows = [(c.code, c.severity, f"{c.title}. {c.meaning}", c.healthy, c.fix) for c in codes().values()]
    parts.append("## Findings of `shikomi data check`\n\n" + table(head, rows))
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def explained(entries: list[Explanation], healthy: str) -> str:
    head = ("name", "what it is", *([healthy] if healthy else []), "what to do")
    rows = [(e.name, f"{e.title}. {e.meaning}", *([e.healthy] if healthy else []), e.do) for e in entries]
    return table(head, rows)


def plan_page() -> str:
    """The page as it is, with its tables made anew between their markers."""
    from shikomi.plan.quoted import all_tables

    text = (GUIDE / "plan.md").read_text(encoding="utf-8")
    for made in all_tables():
        lines = [made.head, tuple("---" for _ in made.head), *(tuple(map(cell, row)) for row in made.rows)]
        body = [f"{made.title}:", "", *("| " + " | ".join(line) + " |" for line in lines)]
        body += ["", *made.notes] if made.notes else []
        start, end = f"<!-- table {made.name} -->", "<!-- /table -->"
        before, _, after = text.partition(start)
        text = "\n".join([before + start, *body, end]) + after.partition(end)[2]
    return text


PAGES = {
    "advise.md": guide.page,
    "recipe.md": recipe_page,
    "other-tools.md": other_tools_page,
    "metrics.md": metrics_page,
    "plan.md": plan_page,
}


def main() -> None:
    for name, page in PAGES.items():
        (GUIDE / name).write_text(page(), encoding="utf-8")
        print(f"docs/guide/{name}")


if __name__ == "__main__":
    main()
