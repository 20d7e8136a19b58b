"""Write the parts of the guide that the source already says: the recipe reference and the table of other tools' keys.

python docs/generate.py          writes docs/guide/recipe.md and docs/guide/other-tools.md (a test compares them)
"""

from pathlib import Path
from typing import Any

from shikomi import registry
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


PAGES = {"recipe.md": recipe_page, "other-tools.md": other_tools_page}


def main() -> None:
    for name, page in PAGES.items():
        (GUIDE / name).write_text(page(), encoding="utf-8")
        print(f"docs/guide/{name}")


if __name__ == "__main__":
    main()
