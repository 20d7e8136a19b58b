"""Options of the commands in which a model answers; output.py has those that others have too."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL|RUN", help="What answers.")]
Rows = Annotated[Path, typer.Argument(metavar="FILE", help="Rows: jsonl, json, csv or parquet.")]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")]
Temperature = Annotated[float, typer.Option(min=0, help="0: the most probable answer; above: sampled.")]
TopP = Annotated[float, typer.Option(min=0, max=1, help="Sample from the most probable tokens of this mass.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of sampling.")]
Prompt = Annotated[str | None, typer.Option(help="Template of the question: 'Classify: {text}'.")]
Completion = Annotated[str | None, typer.Option(help="Template of the reference answer: '{label}'.")]
Limit = Annotated[int | None, typer.Option(min=1, help="At most this many rows.")]
