"""A preview as an HTML page of its own, and as coloured text for a terminal."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Group
from rich.text import Text

from shikomi.data.shown import Span
from shikomi.evaluate.page import render_page
from shikomi.steps.preview import ShownBatch, ShownPart, ShownSegment, ShownStage, text_of

IDS_IN_TERMINAL = 60
CUT_IN_TERMINAL = 300  # characters of what max_length took away

STYLE = """
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 .8rem; line-height: 1.9; }
.tokens span { border-left: 1px solid var(--line); padding: .1rem 0; color: var(--muted); }
.tokens .y { background: var(--tint); color: var(--ink); border-bottom: 2px solid var(--accent); }
.tokens .cut { text-decoration: line-through; opacity: .55; }
.cutmark { color: var(--bad); font-weight: 600; font-size: .85rem; }
.bar { display: flex; gap: 2px; margin: .4rem 0 .8rem; min-height: 1.9rem; }
.bar div { background: var(--track); border-radius: 3px; font-size: .75rem; overflow: hidden; padding: .2rem .3rem;
  min-width: 3px; white-space: nowrap; color: var(--muted); }
.bar .answer { border-bottom: 3px solid var(--accent); }
.bar .shared { background: var(--tint); color: var(--ink); outline: 1px dashed var(--accent); }
.batch { margin-bottom: .9rem; }
td.name { min-width: 14rem; }
td.sees { white-space: nowrap; }
"""

PAGE = """\
{% for stage in stages %}
<h2 id="{{ stage.id }}">{{ stage.heading }}</h2>
<dl class="facts">
{% for label, value in stage.facts %}
<div class="card"><dt>{{ label }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
</dl>
<h2>{{ stage.step }}</h2>
<p class="small muted">Each bar is a micro-batch: one row of tokens, in which every example sees only itself and the
stretches that stand before it as shared. Widths are tokens. Dashed stretches are computed once for several examples;
underlined ones hold trained tokens.</p>
{% for batch in stage.batches %}
<article class="card batch" aria-label="Micro-batch {{ loop.index }}">
<h3>Micro-batch {{ loop.index }}: {{ batch.summary }}</h3>
<div class="bar" aria-hidden="true">
{% for segment in batch.segments %}
<div class="{{ segment.kind }}" style="flex: {{ segment.tokens }} 1 0" title="{{ segment.name }}: \
{{ segment.tokens }} tokens">{{ segment.short }}</div>
{% endfor %}
</div>
<div class="scroll"><table>
<thead><tr><th scope="col">Stretch</th><th scope="col">Tokens</th><th scope="col">Trained</th>
<th scope="col">Sees</th></tr></thead>
<tbody>
{% for segment in batch.segments %}
<tr><td class="name" style="padding-left: {{ 1.4 * segment.depth }}rem">{{ segment.name }}</td>
<td>{{ segment.tokens }}</td><td>{{ segment.trained }}</td><td class="sees muted">{{ segment.sees }}</td></tr>
{% endfor %}
</tbody></table></div>
</article>
{% endfor %}
{% for note in stage.notes %}<p class="small muted">{{ note }}</p>{% endfor %}
<h2>Rows as tokens</h2>
<p class="small muted">Trained tokens are tinted and underlined; point at a token for its id. A line break that is part
of a token is shown as \u21b5.</p>
{% for row in stage.rows %}
<article class="card example" aria-label="Row {{ row.row }}">
<h3>Row {{ row.row }} &middot; {{ row.file }}:{{ row.line }}</h3>
{% for part in row.parts %}
<h3>{{ part.heading }}</h3>
<p class="tokens">{% for span in part.tokens %}<span{% if span.trained %} class="y"{% endif %} \
title="{{ span.ids }}">{{ span.text }}</span>{% endfor %}
{% if part.cut %}
<span class="cutmark">\u2702 cut here, {{ part.cut_tokens }} tokens are left out: </span>\
<span class="cut">{{ part.cut }}</span>
{% endif %}</p>
{% endfor %}
</article>
{% endfor %}
{% endfor %}
"""


def as_page(name: str, model: str, stages: Sequence[ShownStage]) -> str:
    """The page: it holds everything it shows."""
    shown = [_page_stage(stage, index) for index, stage in enumerate(stages)]
    title = f"{name}: data preview"
    return render_page(title, PAGE, STYLE, kind="Data preview", heading=title, subtitle=f"model {model}", stages=shown)


def _page_stage(stage: ShownStage, index: int) -> dict[str, Any]:
    return {
        "id": f"stage-{index + 1}",
        "heading": f"Stage {stage.name}: {stage.objective} on {stage.kind}",
        "facts": [(key.replace("_", " "), f"{value:,}") for key, value in stage.counts.items()],
        "step": step_line(stage),
        "batches": [
            {"summary": batch_line(batch), "segments": [_page_segment(batch, s) for s in batch.segments]}
            for batch in stage.batches
        ],
        "notes": notes(stage),
        "rows": [
            {"row": row.row, "file": row.file, "line": row.line, "parts": [_page_part(part) for part in row.parts]}
            for row in stage.rows
        ],
    }


def _page_segment(batch: ShownBatch, segment: ShownSegment) -> dict[str, Any]:
    shared = segment.name in ("beginning", "prompt")
    above = stretches_above(batch, segment)
    return {
        "kind": "shared" if shared else "answer" if segment.trained else "",
        "name": segment_name(segment),
        "short": _numbers(segment.rows, 3),
        "tokens": segment.tokens,
        "trained": segment.trained,
        "depth": len(above),
        "sees": ", ".join(["itself", *(f"the {stretch.name}" for stretch in above)]),
    }


def _page_part(part: ShownPart) -> dict[str, Any]:
    tokens = [
        {"text": s.text.replace("\n", "\u21b5\n"), "ids": " ".join(map(str, s.ids)), "trained": s.trained}
        for s in part.tokens
    ]
    cut = sum(len(span.ids) for span in part.cut)
    return {"heading": part_line(part), "tokens": tokens, "cut": text_of(part.cut), "cut_tokens": cut}


def as_text(stages: Sequence[ShownStage], brackets: bool) -> Group:
    """The same for a terminal. `brackets`: trained tokens between double brackets, where there are no colours."""
    lines: list[Text] = []
    for stage in stages:
        lines.append(Text(f"stage {stage.name}: {stage.objective} on {stage.kind}", style="bold"))
        counts = (f"{value:,} {key.replace('_', ' ')}" for key, value in stage.counts.items())
        lines += [Text("  " + ", ".join(counts)), Text(), Text(step_line(stage), style="bold")]
        for number, batch in enumerate(stage.batches, start=1):
            lines.append(Text(f"  micro-batch {number}: {batch_line(batch)}"))
            lines += [_segment_text(batch, segment) for segment in batch.segments]
        lines += [Text(f"  {note}") for note in notes(stage)]
        for row in stage.rows:
            lines += [Text(), Text(f"row {row.row}  {row.file}:{row.line}", style="bold")]
            for part in row.parts:
                lines += _part_text(part, brackets)
        lines.append(Text())
    lines.append(_legend(brackets))
    return Group(*lines)


def _legend(brackets: bool) -> Text:
    if brackets:
        return Text("[[trained]]: in double brackets; ids of trained tokens have a *")
    return Text("trained", style="bold green").append(", not trained", style="default").append(", cut", style="red")


def _segment_text(batch: ShownBatch, segment: ShownSegment) -> Text:
    line = Text("    " + "  " * len(stretches_above(batch, segment)) + segment_name(segment))
    line.append(f", {_tokens(segment.tokens)}")
    if segment.trained:
        line.append(f", {segment.trained:,} trained", style="green")
    if segment.name in ("beginning", "prompt"):
        line.append(", computed once", style="cyan")
    return line


def _part_text(part: ShownPart, brackets: bool) -> list[Text]:
    body = Text("  ")
    for trained, run in _runs(part.tokens):
        mark = ("[[", "]]") if brackets and trained else ("", "")
        body.append(mark[0] + text_of(run).replace("\n", "\n  ") + mark[1], style="bold green" if trained else None)
    lines = [Text(f"  {part_line(part)}", style="cyan"), body]
    if part.cut:
        lost = text_of(part.cut)
        lost = lost if len(lost) <= CUT_IN_TERMINAL else lost[:CUT_IN_TERMINAL] + "..."
        count = sum(len(span.ids) for span in part.cut)
        lines.append(Text(f"  -- cut here, {count:,} tokens are left out: {lost!r}", style="red"))
    ids = Text("  ids")
    for token, trained in [(i, s.trained) for s in part.tokens for i in s.ids][:IDS_IN_TERMINAL]:
        ids.append(f" {token}" + ("*" if brackets and trained else ""), style="green" if trained else "dim")
    if len(part.ids) > IDS_IN_TERMINAL:
        ids.append(f" ... {len(part.ids) - IDS_IN_TERMINAL:,} more (--json has all)", style="dim")
    return [*lines, ids]


def _runs(tokens: Iterable[Span]) -> list[tuple[bool, list[Span]]]:
    found: list[tuple[bool, list[Span]]] = []
    for span in tokens:
        if not found or found[-1][0] != span.trained:
            found.append((span.trained, []))
        found[-1][1].append(span)
    return found


def part_line(part: ShownPart) -> str:
    """What a stretch of a row is, with its counts."""
    return f"{part.name}: {_tokens(len(part.ids))}, {part.trained:,} trained"


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count:,} tokens"


def step_line(stage: ShownStage) -> str:
    """Which step is shown, and how it is taken apart."""
    if stage.step is None:
        return "No step of the first epoch has this row: its source is seen less than once an epoch"
    count = f"{len(stage.batches)} micro-batch{'es' if len(stage.batches) != 1 else ''}"
    return f"Step {stage.step:,} of {stage.steps:,}: {count} of at most {stage.micro_batch_tokens:,} tokens"


def batch_line(batch: ShownBatch) -> str:
    """How many tokens of a micro-batch are computed, shared, trained."""
    rows = dict.fromkeys(row for segment in batch.segments for row in segment.rows)
    saved = batch.tokens - batch.computed
    shared = f" ({saved:,} of {batch.tokens:,} saved by sharing)" if saved else ""
    trained = sum(segment.trained for segment in batch.segments)
    count = "1 row" if len(rows) == 1 else f"{len(rows)} rows"
    return f"{count}, {batch.computed:,} tokens computed{shared}, {trained:,} trained"


def notes(stage: ShownStage) -> list[str]:
    """What else belongs to the step."""
    if not stage.mismatched:
        return []
    return [f"besides, {stage.mismatched} micro-batches of prompts with the answers to others, for {stage.objective}"]


def segment_name(segment: ShownSegment) -> str:
    """What a stretch of the packed row holds."""
    rows = f"row{'s' if len(segment.rows) > 1 else ''} {_numbers(segment.rows, 12)}"
    return rows if segment.name == "row" else f"{segment.name} of {rows}"


def _numbers(rows: Sequence[int], most: int) -> str:
    shown = ", ".join(str(row) for row in rows[:most])
    return shown if len(rows) <= most else f"{shown} and {len(rows) - most} more"


def stretches_above(batch: ShownBatch, segment: ShownSegment) -> list[ShownSegment]:
    """The shared stretches that this one sees, the nearest first."""
    found, at = [], segment.parent
    while at >= 0:
        found.append(batch.segments[at])
        at = found[-1].parent
    return found
