"""What all HTML pages share: style, header and footer; a page asks nothing of a network and runs no script."""

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
<header>
<p>{{ kind }}</p>
<h1>{{ heading }}</h1>
<p>{{ subtitle }}</p>
</header>
<main>
"""

FOOT = """\
</main>
<footer>Written by Shikomi. This page holds everything it shows and loads nothing.{{ closing }}</footer>
</div>
</body>
</html>
"""


def render_page(
    title: str,
    body: str,
    style: str = "",
    *,
    kind: str,
    heading: str,
    subtitle: str,
    closing: str = "",
    **values: Any,
) -> str:
    """A page of our own style around a template's text; it asks nothing of a network and runs no script.

    `closing` ends the footer. Values are escaped, but for `Markup` of our own making; one that the template names and
    is not given is an error.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    frame = {"title": title, "style": Markup(STYLE + style), "kind": kind, "heading": heading, "subtitle": subtitle}
    return environment.from_string(HEAD + body + FOOT).render(frame, closing=closing, **values)
