"""The HTML of a sweep, within the frame that all pages have."""

MORE_STYLE = """
.wrap { max-width: 90rem; }
tr.reference > * { background: var(--tint); }
.wide td, .wide th { white-space: nowrap; }
.wide tbody th { position: sticky; left: 0; background: var(--card); }
.wide tr.reference > th { background: var(--tint); }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 34rem), 1fr)); gap: 1rem; }
code { font: .86rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.failed { color: var(--bad); }
"""

PAGE = """\
<section class="card verdict" aria-label="Verdict"><strong>{{ verdict }}</strong>
{% for line in baselines %}<p>{{ line }}</p>{% endfor %}
</section>
<h2 id="cells">Cells</h2>
<div class="card scroll wide" role="region" aria-labelledby="cells" tabindex="0">
<table>
<thead><tr>{% for title in titles %}<th scope="col">{{ title }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr{% if row.reference %} class="reference"{% endif %}><th scope="row">{{ row.name }}</th>
{% for cell in row.cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
<div class="small muted under">
{% for line in remarks %}<p>{{ line }}</p>{% endfor %}
</div>
{% if pictures %}
<h2 id="pictures">Pictures</h2>
<div class="pictures">
{% for picture in pictures %}
<figure class="card chart"><div role="img" aria-label="{{ picture.title }}">{{ picture.svg }}</div>
<figcaption>{{ picture.title }}</figcaption></figure>
{% endfor %}
</div>
{% endif %}
<h2 id="runs">Runs</h2>
<div class="card scroll"><table>
<thead><tr><th scope="col">Run</th><th scope="col">Seed</th><th scope="col">Status</th>
<th scope="col">Score</th></tr></thead>
<tbody>
{% for run, seed, status, came in cells %}
<tr><th scope="row">{{ run }}</th><td>{{ seed }}</td>
<td{% if status == "failed" %} class="failed"{% endif %}>{{ status }}</td><td>{{ came }}</td></tr>
{% endfor %}
</tbody></table></div>
<h2 id="overrides">What each cell changes in the recipe</h2>
<div class="card scroll"><table><tbody>
{% for cell, changes in overrides %}
<tr><th scope="row">{{ cell }}</th>
<td><code>{% for key, value in changes.items() %}{{ key }}={{ value | tojson }} {% endfor %}</code></td></tr>
{% endfor %}
</tbody></table></div>
"""
