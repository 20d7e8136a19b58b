"""The HTML of the report: one page that asks nothing of a network and runs no script."""

from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

STYLE = """
:root {
  color-scheme: light dark;
  --page: #faf9f6; --card: #ffffff; --ink: #1d222c; --muted: #555c6b; --faint: #6b7280; --line: #dedbd3;
  --accent: #0b7285; --second: #c2410c; --good: #1a7340; --bad: #b3261e; --unsure: #8a5a00;
  --tint: #e6f2f4; --track: #eeece6;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171d; --card: #1c2028; --ink: #e8e6e1; --muted: #a9afbc; --faint: #8b93a3; --line: #333945;
    --accent: #5bc4d8; --second: #ff9a5c; --good: #6fd39a; --bad: #ff8a80; --unsure: #f0c060;
    --tint: #19323a; --track: #282d37;
  }
}
* { box-sizing: border-box; }
html { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Noto Sans CJK JP", sans-serif; }
body { margin: 0; background: var(--page); color: var(--ink); }
.wrap { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
header p { margin: 0; color: var(--muted); }
h1 { font-size: 1.9rem; line-height: 1.2; margin: .15rem 0 .35rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .8rem; }
h3 { font-size: .95rem; margin: 0 0 .5rem; color: var(--muted); font-weight: 600; }
p { margin: 0 0 .7rem; }
.muted { color: var(--muted); }
.small { font-size: .88rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1.1rem 1.25rem; }
.verdict { margin-top: 1.6rem; border-left: 6px solid var(--unsure); }
.verdict.better { border-left-color: var(--good); }
.verdict.worse { border-left-color: var(--bad); }
.verdict strong { display: block; font-size: 1.3rem; line-height: 1.3; margin-bottom: .35rem; }
.verdict p { margin: 0; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem; margin: 1rem 0 0;
  padding: 0; }
.facts div { padding: .8rem 1rem; }
.facts dt { color: var(--muted); font-size: .85rem; }
.facts dd { margin: 0; font-size: 1.25rem; font-weight: 650; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--muted); font-size: .88rem; padding-bottom: .5rem; }
th, td { text-align: left; padding: .55rem .9rem .55rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
thead th { color: var(--muted); font-size: .85rem; font-weight: 600; white-space: nowrap; }
tbody th { font-weight: 600; white-space: nowrap; }
tr:last-child > * { border-bottom: 0; }
tr.trained > * { background: var(--tint); }
tr.trained > th { padding-left: .7rem; border-radius: 6px 0 0 6px; }
tr.trained > td:last-child { border-radius: 0 6px 6px 0; }
td b { font-size: 1.05rem; }
.cell { display: flex; gap: .9rem; }
.cell .value { flex: 0 0 7rem; }
.cell svg { flex: 1 1 7rem; min-width: 5rem; height: 2.1rem; overflow: visible; }
.value { white-space: nowrap; }
figure { margin: 0; }
figcaption { color: var(--muted); font-size: .88rem; margin-top: .5rem; }
.chart svg { display: block; width: 100%; height: auto; }
.chart svg text { font-family: inherit !important; }
.example { margin-bottom: .9rem; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .9rem; margin-top: .9rem;
  border-top: 1px solid var(--line); padding-top: .9rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; max-height: 16rem; overflow-y: auto; }
.mark { font-size: .8rem; font-weight: 600; margin-left: .4rem; }
.mark.yes { color: var(--good); }
.mark.no { color: var(--bad); }
pre { margin: 0; overflow-x: auto; font: .86rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.under { margin-top: .8rem; }
footer { margin-top: 3rem; color: var(--muted); font-size: .88rem; }
@media (max-width: 44rem) {
  .cell svg { display: none; }
  tbody th { white-space: normal; }
  .chart > div { overflow-x: auto; }
  .chart svg { min-width: 34rem; }
}
@media print { .text { max-height: none; } body { background: none; } .card { break-inside: avoid; } }
"""

HEAD = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
<div class="wrap">
"""

PAGE = """\
<header>
<p>Training report</p>
<h1>{{ name }}</h1>
<p>{{ subtitle }}</p>
</header>
<main>
{% if verdict %}
<section class="card verdict {{ verdict.outcome }}" aria-label="Verdict">
<strong>{{ verdict.headline }}</strong>
<p>{{ verdict.detail }}</p>
</section>
{% else %}
<section class="card verdict" aria-label="Verdict">
<strong>Not compared with the untouched model.</strong>
<p>{{ no_verdict }}</p>
</section>
{% endif %}
<dl class="facts">
{% for label, value in facts %}
<div class="card"><dt>{{ label }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
</dl>
{% if systems %}
<h2 id="comparison">Comparison</h2>
<div class="card scroll" role="region" aria-labelledby="comparison" tabindex="0">
<table>
<caption>All systems on the same {{ n }} rows, decoded the same way, with 95% intervals.</caption>
<thead><tr><th scope="col">System</th>
{% for column in columns %}<th scope="col" title="{{ column.about }}">{{ column.name }}</th>{% endfor %}
<th scope="col">Time</th></tr></thead>
<tbody>
{% for system in systems %}
<tr{% if system.trained %} class="trained"{% endif %}><th scope="row">{{ system.name }}</th>
{% for cell in system.cells %}
{% if cell %}
<td><div class="cell"><div class="value"><b>{{ cell.value }}</b><br>
<span class="muted small">{{ cell.interval }}</span></div>
<svg viewBox="0 0 100 20" preserveAspectRatio="none" aria-hidden="true">
<line x1="0" y1="10" x2="100" y2="10" stroke="var(--track)" stroke-width="6" />
<line x1="{{ cell.low }}" y1="10" x2="{{ cell.high }}" y2="10" stroke-width="6"
 stroke="{% if system.trained %}var(--accent){% else %}var(--faint){% endif %}" />
<line x1="{{ cell.at }}" y1="3" x2="{{ cell.at }}" y2="17" stroke="var(--ink)" stroke-width="2"
 vector-effect="non-scaling-stroke" />
</svg></div></td>
{% else %}
<td class="muted">not measured</td>
{% endif %}
{% endfor %}
<td class="value">{{ system.seconds }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
{% if gaps %}
<p class="small muted under">
{% for gap in gaps %}{{ gap }}<br>{% endfor %}</p>
{% endif %}
{% for note in notes %}<p class="small muted">{{ note }}</p>{% endfor %}
{% endif %}
<h2 id="loss">Loss</h2>
<figure class="card chart">
{% if chart %}<div role="img" aria-label="{{ chart_text }}">{{ chart }}</div>{% endif %}
<figcaption>{{ chart_text }}</figcaption>
</figure>
{% if stages %}
<h2 id="stages">Stages</h2>
<div class="card scroll"><table>
<thead><tr><th scope="col">Stage</th><th scope="col">Steps</th><th scope="col">Final loss</th>
<th scope="col">Time</th></tr></thead>
<tbody>
{% for stage in stages %}
<tr><th scope="row">{{ stage.name }}</th><td>{{ stage.steps }}</td><td>{{ stage.loss }}</td>
<td>{{ stage.time }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}
{% if examples %}
<h2 id="examples">Examples</h2>
<p class="small muted">Drawn at random from the test rows. Base is the untouched model, {{ examples_base }}.</p>
{% if examples_common %}
<details class="card example"><summary>Every input begins with the same text</summary>
<p class="text">{{ examples_common }}</p></details>
{% endif %}
{% for example in examples %}
<article class="card example" aria-label="Example {{ loop.index }}">
<h3>Input</h3>
<p class="text">{{ example.input }}</p>
<div class="sides">
{% for side in example.sides %}
<div><h3>{{ side.name }}{% if side.mark %}
<span class="mark {{ side.mark }}">{{ "\u2713 same" if side.mark == "yes" else "\u2717 differs" }}</span>
{% endif %}</h3>
<p class="text">{{ side.text }}</p></div>
{% endfor %}
</div>
</article>
{% endfor %}
{% endif %}
{% if costs %}
<h2 id="cost">{{ "Planned and measured" if planned else "Measured" }}</h2>
<div class="card scroll"><table>
<thead><tr><th scope="col">Quantity</th>
{% if planned %}<th scope="col">Planned</th>{% endif %}
<th scope="col">Measured</th></tr></thead>
<tbody>
{% for cost in costs %}
<tr><th scope="row">{{ cost.name }}</th>
{% if planned %}<td>{{ cost.planned }}</td>{% endif %}
<td>{{ cost.measured }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}
{% if recipe %}
<h2 id="recipe">Recipe</h2>
<div class="card"><pre tabindex="0" aria-label="The recipe">{{ recipe }}</pre></div>
{% endif %}
{% if versions %}
<h2 id="versions">Versions</h2>
<div class="card scroll"><table><tbody>
{% for package, version in versions %}
<tr><th scope="row">{{ package }}</th><td>{{ version }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}
</main>
<footer>Written by Shikomi. This page holds everything it shows and loads nothing.
<code>shikomi explain NAME</code> says what a number means and what is healthy.</footer>
</div>
</body>
</html>
"""


def render_page(title: str, body: str, style: str = "", **values: Any) -> str:
    """A page of our own style around a template's text; it asks nothing of a network and runs no script.

    Values are escaped, but for `Markup` of our own making; one that the template names and is not given is an error.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(HEAD + body).render(title=title, style=Markup(STYLE + style), **values)
