"""The shape of the source: which stage may import which, how long a file may be, and what never appears in it."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "shikomi"

# The line from a recipe to a report. A stage imports itself and what stands to its left.
STAGES = (
    *("errors", "registry", "progress", "recipe", "data", "quant", "adapters", "model", "objectives", "optim"),
    *(
        "metrics",
        "rewards",
        "train",
        "checkpoint",
        "evaluate",
        "plan",
        "advise",
        "doctor",
        "steps",
        "run",
        "inference",
        "sweep",
    ),
    *("__init__", "demo", "commands", "cli"),
)
ROOT_MODULES = {"errors", "registry", "progress"}  # these three may see each other
TORCH_FREE = {"errors", "registry", "progress", "recipe", "__init__", "commands", "cli"}
LONGEST_MODULE = 350

FORBIDDEN = {
    r"torch\.load\(": "reads pickles; read safetensors",
    r"^\s*(import|from) (c?pickle|dill|joblib)\b": "runs code from a file; write safetensors and JSON",
    r"\bpickle\.loads?\(": "runs code from a file; write safetensors and JSON",
    r"allow_pickle\s*=\s*True": "runs code from a file",
    r"trust_remote_code\s*=\s*True": "runs code from a model folder",
    r"yaml\.(unsafe_|full_)?load\(": "use the loader in recipe/",
    r"^\s*except\s*:": "name the exception",
    r"except (Base)?Exception[^:]*:\s*pass\b": "says nothing about what went wrong",
    r"\bNotImplementedError\b": "build it, or refuse it by name with a ShikomiError",
    r"\b(TODO|FIXME|XXX)\b": "do it, or file an issue",
    r"\beval\(|\bexec\(": "runs text as code",
}
# Methods that happen to be called eval: module.eval() and model.eval().
ALLOWED = re.compile(r"\.eval\(\)")

MACHINE_PATH = re.compile(r"(?<![\w./~-])/(?:home|root|Users|work|mnt|opt|tmp|var)/[\w.-]+")


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def stage_of(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imported_stages(path: Path) -> Iterator[tuple[int, str]]:
    """Line and stage of each import of this package in a file, also inside functions."""
    package = ["shikomi", *path.relative_to(SOURCE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parent, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "shikomi":
                known = len(parts) > 1 and parts[1] in STAGES
                yield node.lineno, parts[1] if known else "__init__"


def top_level_imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Imports that run when the module is imported: not those in functions or under TYPE_CHECKING."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or ""
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            waiting.extend(node.orelse)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            waiting.extend(ast.iter_child_nodes(node))


def misplaced(path: Path) -> list[str]:
    here = stage_of(path)
    if here not in STAGES:
        return [f"{relative(path)}: {here!r} is no stage; the stages are {', '.join(STAGES)}"]
    found = []
    for line, stage in imported_stages(path):
        left = STAGES.index(stage) <= STAGES.index(here)
        if not left and not {stage, here} <= ROOT_MODULES:
            found.append(f"{relative(path)}:{line}: {here} imports {stage}, which comes after it")
    return found


def test_a_stage_imports_only_what_stands_to_its_left():
    found = [line for path in modules() for line in misplaced(path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text, stages",
    [
        ("from shikomi.run import train", ["run"]),
        ("import shikomi.cli as c", ["cli"]),
        ("def f():\n    from ..train import loop", ["train"]),
        ("from .. import cli", ["cli"]),
        ("from .lora import Lora", ["adapters"]),
        ("from shikomi import Recipe", ["__init__"]),
        ("import torch", []),
    ],
)
def test_imports_are_seen_however_they_are_written(text, stages, tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.SOURCE", tmp_path)
    (tmp_path / "adapters").mkdir()
    path = tmp_path / "adapters" / "new.py"
    path.write_text(text)
    assert [stage for _, stage in imported_stages(path)] == stages


def test_modules_stay_readable_in_one_go():
    long = {relative(p): n for p in modules() if (n := len(p.read_text("utf-8").splitlines())) > LONGEST_MODULE}
    assert not long, f"longer than {LONGEST_MODULE} lines, look for a seam: {long}"


def test_there_is_no_utils_module():
    assert [relative(p) for p in modules() if p.stem in {"utils", "util", "helpers", "misc", "common"}] == []


def test_every_module_says_what_it_is():
    trees = {p: ast.parse(p.read_text("utf-8")) for p in modules()}
    silent = [relative(p) for p, tree in trees.items() if tree.body and not ast.get_docstring(tree)]
    assert silent == []


def test_nothing_forbidden_is_in_the_source():
    found = []
    for path in modules():
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            code = ALLOWED.sub("", line)
            for pattern, why in FORBIDDEN.items():
                if re.search(pattern, code):
                    found.append(f"{relative(path)}:{number}: {why}: {line.strip()}")
    assert not found, "\n".join(found)


def test_torch_free_stages_import_no_torch_at_the_top():
    heavy = {"torch", "transformers", "safetensors", "peft", "trl", "datasets", "matplotlib", "pyarrow"}
    found = []
    for path in modules():
        if stage_of(path) in TORCH_FREE:
            for line, name in top_level_imports(ast.parse(path.read_text("utf-8"))):
                if name.split(".")[0] in heavy:
                    found.append(f"{relative(path)}:{line}: imports {name}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["models", "--help"]])
def test_help_does_not_import_torch(arguments):
    program = (
        "import json, sys\n"
        f"sys.argv = ['shikomi', *{arguments!r}]\n"
        "from shikomi.cli import main\n"
        "try:\n    code = main()\n"
        "except SystemExit as stop:\n    code = stop.code\n"
        "print(json.dumps([code or 0, sorted({m.split('.')[0] for m in sys.modules})]), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    code, loaded = json.loads(done.stderr.splitlines()[-1])
    assert code == 0 and "Usage" in done.stdout
    assert not {"torch", "transformers", "numpy", "matplotlib", "pyarrow"} & set(loaded)


def documents() -> list[Path]:
    skip = {".venv", ".git", ".cache", "runs", "build", "dist", "node_modules"}
    return [
        p
        for pattern in ("*.md", "*.yaml", "*.yml", "*.toml", "Makefile")
        for p in ROOT.rglob(pattern)
        if not skip & set(p.relative_to(ROOT).parts[:-1]) and not any(part.startswith(".") for part in p.parts[-2:-1])
    ]


def test_documents_name_no_path_of_one_machine():
    found = []
    for path in [*documents(), *modules(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        if path != Path(__file__).resolve():
            for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
                found += [f"{relative(path)}:{number}: {m.group()}" for m in MACHINE_PATH.finditer(line)]
    assert not found, "\n".join(found)


def test_links_in_documents_lead_somewhere():
    broken = []
    for path in documents():
        if path.suffix == ".md":
            for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text("utf-8")):
                if "://" not in target and not (path.parent / target).exists():
                    broken.append(f"{relative(path)}: {target}")
    assert not broken, "\n".join(broken)
