"""The HTML of a run's report, within the frame that all pages have."""

from markupsafe import Markup

PAGE = """\
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
"""

CLOSING = Markup("\n<code>shikomi explain NAME</code> says what a number means and what is healthy.")
