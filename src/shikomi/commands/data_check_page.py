"""The page of `data check`: findings with their places, and the figures; it holds everything it shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from shikomi.commands.data_check import figures, where
from shikomi.evaluate.page import render_page

if TYPE_CHECKING:
    from shikomi.data.checkup import Checkup
    from shikomi.data.tasks import Task

PLACES_SHOWN = 100

STYLE = """
.finding { margin-bottom: .9rem; border-left: 6px solid var(--faint); }
.finding.error { border-left-color: var(--bad); }
.finding.warning { border-left-color: var(--unsure); }
.finding h3 { color: var(--ink); font-size: 1.05rem; }
.severity { font-size: .8rem; font-weight: 600; margin-right: .5rem; }
.error .severity { color: var(--bad); }
.warning .severity { color: var(--unsure); }
td.text { max-height: none; }
"""

PAGE = """\
<section class="card verdict {{ outcome }}" aria-label="Verdict"><strong>{{ verdict }}</strong>
{% for note in notes %}<p>{{ note }}</p>{% endfor %}
</section>
{% for task in tasks %}
{% if tasks | length > 1 %}<h2 id="task{{ loop.index }}">{{ task.name }}</h2>{% endif %}
<dl class="facts">
{% for label, value in task.facts %}
<div class="card"><dt>{{ label }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
</dl>
<h2 id="findings{{ loop.index }}">Findings</h2>
{% if not task.findings %}<p>Nothing was found.</p>{% endif %}
{% for finding in task.findings %}
<article class="card finding {{ finding.severity }}" aria-label="{{ finding.code }}">
<h3><span class="severity">{{ finding.code }} {{ finding.severity }}</span>{{ finding.title }}: {{ finding.count }}</h3>
{% for detail in finding.details %}<p>{{ detail }}</p>{% endfor %}
<p class="small muted">{{ finding.meaning }}<br>Healthy: {{ finding.healthy }}.<br>What to do: {{ finding.fix }}.</p>
{% if finding.places %}
<details{% if finding.places | length <= 5 %} open{% endif %}><summary>{{ finding.summary }}</summary>
<div class="scroll"><table>
<thead><tr><th scope="col">Line</th><th scope="col">Text</th><th scope="col">Remark</th></tr></thead>
<tbody>
{% for place in finding.places %}
<tr><th scope="row">{{ place.where }}</th><td class="text">{{ place.excerpt }}</td><td>{{ place.note }}</td></tr>
{% endfor %}
</tbody></table></div></details>
{% endif %}
</article>
{% endfor %}
{% if task.cuts %}
<h2 id="lengths{{ loop.index }}">Rows that max_length would cut</h2>
<div class="card scroll"><table>
<thead><tr><th scope="col">max_length</th><th scope="col">Rows cut</th><th scope="col">Share</th>
<th scope="col">Tokens lost</th></tr></thead>
<tbody>
{% for cut in task.cuts %}
<tr><th scope="row">{{ cut.limit }}</th><td>{{ cut.rows }}</td><td>{{ cut.share }}</td><td>{{ cut.tokens }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}
{% if task.figures %}
<h2 id="figures{{ loop.index }}">Figures</h2>
<div class="card">{% for line in task.figures %}<p>{{ line }}</p>{% endfor %}</div>
{% endif %}
{% endfor %}
"""


def as_page(name: str, found: Sequence[tuple[Task, Checkup]], notes: Sequence[str]) -> str:
    """The whole page as HTML."""
    errors, warnings = (sum(checked.count(kind) for _, checked in found) for kind in ("error", "warning"))
    rows = sum(sum(checked.rows.values()) for _, checked in found)
    verdict = f"{errors:,} errors, {warnings:,} warnings" if errors or warnings else "Nothing is wrong."
    return render_page(
        f"{name}: data check",
        PAGE,
        STYLE,
        kind="Data check",
        heading=name,
        subtitle=f"{rows:,} rows",
        outcome="worse" if errors else "" if warnings else "better",
        verdict=verdict,
        notes=[*notes, *(note for task, checked in found for note in (*task.notes, *checked.notes))],
        tasks=[_task(task, checked) for task, checked in found],
    )


def _task(task: Task, checked: Checkup) -> dict[str, Any]:
    facts = [(f"{role} rows", f"{count:,}") for role, count in checked.rows.items()]
    cuts = []
    if checked.lengths is not None:
        percentiles = checked.lengths["percentiles"]
        facts += [("half of the rows up to", f"{percentiles['50']:,} tokens")]
        facts += [
            ("the longest", f"{percentiles['100']:,} tokens"),
            ("trained", f"{checked.lengths['trained_share']:.1%}"),
        ]
        cuts = [
            {"limit": limit, "rows": f"{c['rows']:,}", "share": f"{c['share']:.1%}", "tokens": f"{c['tokens']:,}"}
            for limit, c in checked.lengths["cut_at"].items()
        ]
    return {
        "name": task.name,
        "facts": facts,
        "cuts": cuts,
        "figures": figures(checked),
        "findings": [_finding(finding) for finding in checked.findings],
    }


def _finding(finding: Any) -> dict[str, Any]:
    shown = finding.places[:PLACES_SHOWN]
    count = f"{len(shown):,} of {finding.count:,} places"
    if len(shown) == finding.count:
        count = "1 place" if len(shown) == 1 else f"{len(shown):,} places"
    return {
        "code": finding.code,
        "severity": finding.severity,
        "title": finding.title,
        "meaning": finding.about.meaning,
        "healthy": finding.about.healthy,
        "fix": finding.about.fix,
        "count": f"{finding.count:,}",
        "details": finding.details,
        "summary": count,
        "places": [{"where": where(p.file, p.line), "excerpt": p.excerpt, "note": p.note} for p in shown],
    }
