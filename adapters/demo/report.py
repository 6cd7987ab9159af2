"""The report of a demo: one HTML page from records, with nothing outside the page.

It holds the verdict, the table of versions, the timeline, the answers that prove the verdict, and how the run was
made. Every function here is pure.

    Path("report.html").write_text(render_report(report))
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import median

from weightcast.adapters.demo.events import HEADINGS, Phase, VersionRow
from weightcast.adapters.demo.proof import Answer, Comparison, Proof
from weightcast.adapters.demo.report_style import STYLE
from weightcast.adapters.demo.timeline_svg import draw_timeline


@dataclass(frozen=True, slots=True)
class Report:
    """All that a report shows. `settings` and `software` are lists of facts, shown in their order."""

    rows: tuple[VersionRow, ...]
    phases: tuple[Phase, ...]
    proof: Proof
    settings: Mapping[str, str]
    software: Mapping[str, str]


def render_report(report: Report) -> str:
    """The whole page."""
    engine, model = report.settings.get("engine", "engine"), report.settings.get("model", "")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>weightcast demo: {escape(engine)}, {len(report.rows)} versions</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>weightcast demo</h1>
<p class="faint">A Megatron-Core trainer kept a running {escape(engine)} engine in step: {escape(model)}</p>
{render_verdict(report.proof)}
{render_tiles(report.rows)}
<h2>Versions</h2>
{render_table(report.rows)}
<h2>Timeline</h2>
<p class="faint">A lane a process, a bar a phase; v3 is version 3. Point at a bar for its length.</p>
{draw_timeline(report.phases)}
<h2>Proof</h2>
<p class="faint">Answers of the live engine before training, of the same engine at the last version, and of a fresh
engine started on the exported folder; ↵ is a new line. A sampled token depends on the whole distribution, so equal
samples tell more than equal greedy tokens.</p>
{render_proof(report.proof)}
<div class="columns">
<section><h2>Configuration</h2>{render_facts(report.settings)}</section>
<section><h2>Software</h2>{render_facts(report.software)}</section>
</div>
</main>
</body>
</html>
"""


def render_verdict(proof: Proof) -> str:
    """The one sentence that matters, or the reasons why it cannot be said."""
    faults = proof.faults()
    if faults:
        items = "".join(f"<li>{escape(fault)}</li>" for fault in faults)
        return f'<div class="verdict bad">The proof failed.<ul>{items}</ul></div>'
    num_tokens = sum(len(each.live.token_ids) for each in proof.comparisons)
    return (
        f'<div class="verdict good">Proved: at version {proof.last_version} the live engine and a fresh engine on the '
        f"exported folder gave the same {num_tokens} tokens, and other ones than before training.</div>"
    )


def render_tiles(rows: Sequence[VersionRow]) -> str:
    """The figures of the run, over all versions."""
    if not rows:
        return ""
    tiles = {
        "versions served": f"{sum(row.served for row in rows)} of {len(rows)}",
        "loss, first to last": f"{rows[0].loss:.3f} → {rows[-1].loss:.3f}",
        "sent a version": format_bytes(rows[-1].num_bytes),
        "median time to stage": f"{median(row.stage_s for row in rows):.3f} s",
        "median engine pause": f"{median(row.pause_ms for row in rows):.1f} ms",
        "checksums checked": f"{sum(row.checksums_checked for row in rows):,}",
    }
    body = "".join(f'<div class="tile"><b>{value}</b><span>{name}</span></div>' for name, value in tiles.items())
    return f'<div class="tiles">{body}</div>'


def render_table(rows: Sequence[VersionRow]) -> str:
    """A row a version, in the order in which they were published."""
    head = "".join(f"<th>{heading}</th>" for heading in HEADINGS)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row.cells())}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="versions"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def format_bytes(num_bytes: int) -> str:
    """`7.3 MB`, in powers of a thousand."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


def render_proof(proof: Proof) -> str:
    """Three answers a question, each compared with the fresh engine's."""
    body = "".join(_render_comparison(each, proof.last_version) for each in proof.comparisons)
    head = '<tr><th class="who">engine</th><th>answer</th><th class="badge">against the fresh engine</th></tr>'
    return f'<div class="scroll"><table class="answers"><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def _render_comparison(each: Comparison, last_version: int) -> str:
    same = each.live.token_ids == each.fresh.token_ids
    changed = each.before.token_ids != each.fresh.token_ids
    tone = "good" if same else "bad"
    return "".join(
        (
            f'<tr class="prompt"><td colspan="3"><code>{escape(each.question.prompt)}</code> '
            f'<span class="faint">{each.question.manner}</span></td></tr>',
            _render_answer("live, before training", each.before, None, "differs" if changed else "equal", "plain"),
            _render_answer(
                f"live, version {last_version}", each.live, each.fresh, "equal" if same else "DIFFERS", tone
            ),
            _render_answer("fresh, exported folder", each.fresh, None, "", ""),
        )
    )


def _render_answer(who: str, answer: Answer, expected: Answer | None, verdict: str, tone: str) -> str:
    """One row; tokens that differ from those of `expected` are marked."""
    ids = " ".join(
        str(token) if expected is None or expected.token_ids[place : place + 1] == (token,) else f"<mark>{token}</mark>"
        for place, token in enumerate(answer.token_ids)
    )
    text = escape(answer.text.replace("\n", "↵"))
    tag = f'<span class="tag {tone}">{verdict}</span>' if verdict else ""
    return (
        f'<tr><td>{escape(who)}<br><span class="ids">weights: {escape(answer.weight_version)}</span></td>'
        f'<td><code>{text}</code><br><span class="ids">{ids}</span></td><td>{tag}</td></tr>'
    )


def render_facts(facts: Mapping[str, str]) -> str:
    """A list of names and values."""
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f'<dl class="facts">{items}</dl>'
