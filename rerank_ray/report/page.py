"""One self-contained HTML page of results: no scripts, no fonts, no image files; light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from rerank_ray.report.charts import Mark, bar_chart, line_chart, scatter_chart

_SERIES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class PageSystem:
    """One system on the page: its quality, and where known its throughput in query-document pairs a second and size."""

    name: str
    role: str
    """What it is in this experiment: first stage, teacher, student, … Systems of one role share a colour."""
    ndcg: float
    pairs_per_second: float | None = None
    parameters: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """A training step with its loss, its validation nDCG@10, or both."""

    step: int
    loss: float | None = None
    validation_ndcg: float | None = None


def render_page(
    *,
    title: str,
    summary: str,
    systems: Sequence[PageSystem],
    curve: Sequence[CurvePoint] = (),
    details: Mapping[str, str] | None = None,
) -> str:
    """Lay out results as HTML: bars of nDCG@10, quality against throughput, training curves, a table, `details`.

    Systems appear in the order given; parts without data (no throughput, no curve) are left out. Every text is
    escaped; numbers must be finite.

    Raises:
        ValueError: there is no system, or a number is NaN, infinite, or a throughput that is not positive.
    """
    _check(systems, curve)
    roles = list(dict.fromkeys(s.role for s in systems))
    series = {role: i % _SERIES for i, role in enumerate(roles)}
    parts = [_quality(systems, series), _throughput(systems, series), _training(curve), _table(systems, series)]
    if details:
        rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in details.items())
        parts.append(f"<section><h2>How it was measured</h2><dl>{rows}</dl></section>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title><style>{_CSS}</style></head>\n'
        f'<body><main><header><h1>{escape(title)}</h1><p class="summary">{escape(summary)}</p></header>\n'
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


def _check(systems: Sequence[PageSystem], curve: Sequence[CurvePoint]) -> None:
    if not systems:
        raise ValueError("the page needs at least one system: there would be nothing to show")
    numbers = [(s.name, v) for s in systems for v in (s.ndcg, s.pairs_per_second)]
    numbers += [(f"step {p.step}", v) for p in curve for v in (p.loss, p.validation_ndcg)]
    for where, value in numbers:
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{where}: {value} can't be drawn: leave out what was not measured")
    for s in systems:
        if s.pairs_per_second is not None and s.pairs_per_second <= 0:
            raise ValueError(f"{s.name}: pairs_per_second is {s.pairs_per_second}: leave it out if it was not measured")


def _legend(systems: Sequence[PageSystem], series: Mapping[str, int]) -> str:
    roles = dict.fromkeys(s.role for s in systems)
    items = "".join(f'<li><span class="swatch series-{series[r]}"></span>{escape(r)}</li>' for r in roles)
    return f'<ul class="legend">{items}</ul>' if len(roles) > 1 else ""


def _quality(systems: Sequence[PageSystem], series: Mapping[str, int]) -> str:
    values = ", ".join(f"{s.name} {s.ndcg:.3f}" for s in systems)
    chart = bar_chart(
        [Mark(label=s.name, y=s.ndcg, series=series[s.role]) for s in systems],
        title="nDCG@10 of each system",
        description=f"Horizontal bars: {values}.",
    )
    return _section("Quality", "nDCG@10, higher is better", _legend(systems, series) + _figure(chart))


def _throughput(systems: Sequence[PageSystem], series: Mapping[str, int]) -> str:
    measured = [s for s in systems if s.pairs_per_second is not None]
    if not measured:
        return ""
    values = ", ".join(f"{s.name} {s.ndcg:.3f} at {s.pairs_per_second:,.0f}" for s in measured)
    chart = scatter_chart(
        [Mark(label=s.name, x=s.pairs_per_second, y=s.ndcg, series=series[s.role]) for s in measured],
        x_label="pairs scored per second (logarithmic) →",
        y_label="↑ nDCG@10",
        title="nDCG@10 against throughput",
        description=f"Scatter plot of nDCG@10 against pairs per second: {values}.",
    )
    left_out = [s.name for s in systems if s.pairs_per_second is None]
    note = f" Without a measured throughput: {', '.join(left_out)}." if left_out else ""
    dashes = " The dashed line joins systems that no other beats on both." if len(measured) > 1 else ""
    lead = f"Up and to the right is better.{dashes}{note}"
    return _section("Quality against throughput", lead, _legend(measured, series) + _figure(chart))


def _training(curve: Sequence[CurvePoint]) -> str:
    losses = [(p.step, p.loss) for p in curve if p.loss is not None]
    validation = [(p.step, p.validation_ndcg) for p in curve if p.validation_ndcg is not None]
    figures = ""
    if validation:
        best = max(validation, key=lambda p: p[1])
        figures += _figure(
            line_chart(
                validation,
                x_label="training step →",
                y_label="↑ validation nDCG@10",
                title="Validation nDCG@10 by training step",
                description=f"From {validation[0][1]:.3f} to {validation[-1][1]:.3f}, best {best[1]:.3f} at {best[0]}.",
                series=1,
                highlight=best,
            )
        )
    if losses:
        figures += _figure(
            line_chart(
                losses,
                x_label="training step →",
                y_label="↓ loss",
                title="Loss by training step",
                description=f"From {losses[0][1]:.4g} to {losses[-1][1]:.4g} over {len(losses)} points.",
                series=0,
            )
        )
    return _section("Training", "The student's curves.", figures) if figures else ""


def _table(systems: Sequence[PageSystem], series: Mapping[str, int]) -> str:
    rows = "".join(
        f'<tr><th scope="row"><span class="swatch series-{series[s.role]}"></span>{escape(s.name)}</th>'
        f"<td>{escape(s.role)}</td><td>{s.ndcg:.4f}</td><td>{_number(s.pairs_per_second)}</td>"
        f"<td>{_size(s.parameters)}</td></tr>"
        for s in systems
    )
    head = "".join(f'<th scope="col">{h}</th>' for h in ("System", "Role", "nDCG@10", "Pairs/s", "Parameters"))
    table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    return _section("All numbers", "", table)


def _section(title: str, lead: str, body: str) -> str:
    text = f"<p>{escape(lead)}</p>" if lead else ""
    return f"<section><h2>{escape(title)}</h2>{text}{body}</section>"


def _figure(svg: str) -> str:
    return f'<figure class="scroll">{svg}</figure>'


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.2f}"


def _size(parameters: int | None) -> str:
    if parameters is None:
        return "–"
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= size:
            return f"{parameters / size:.3g} {unit}"
    return str(parameters)


_CSS = """
:root{--page:#f6f5f2;--card:#fff;--ink:#1c1d21;--soft:#5d606b;--rule:#e3e1db;--axis:#a9a8a3;
--s0:#8a8f9c;--s1:#c2571a;--s2:#1f66c1;--s3:#2b8a5b}
@media (prefers-color-scheme:dark){:root{--page:#131417;--card:#1c1e23;--ink:#ecebe7;--soft:#a2a5b0;--rule:#30333b;
--axis:#646873;--s0:#9aa0ae;--s1:#ee8b4c;--s2:#6aa5f5;--s3:#58c08b}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:832px;margin:0 auto;padding:48px 20px 64px}
h1{font-size:2rem;line-height:1.2;letter-spacing:-.02em;margin:0 0 .5rem}
h2{font-size:1.15rem;margin:0 0 .25rem}
p{margin:0 0 1rem;color:var(--soft)}
.summary{font-size:1.1rem;max-width:62ch;margin-bottom:2rem}
section{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:24px 28px;margin:0 0 20px}
figure{margin:0}figure+figure{margin-top:28px}
.scroll{overflow-x:auto}
svg{display:block;width:100%;min-width:440px;height:auto;font-size:13px;font-variant-numeric:tabular-nums}
text{fill:var(--ink)}
.tick,.axis-label{fill:var(--soft);font-size:12px}
.value{font-weight:600}
.halo{paint-order:stroke;stroke:var(--card);stroke-width:4px;stroke-linejoin:round}
.grid{stroke:var(--rule)}.axis{stroke:var(--axis)}
.frontier{fill:none;stroke:var(--axis);stroke-width:1.5;stroke-dasharray:4 5}
.series-0{--c:var(--s0)}.series-1{--c:var(--s1)}.series-2{--c:var(--s2)}.series-3{--c:var(--s3)}
rect,circle{fill:var(--c)}circle{stroke:var(--card);stroke-width:1.5}
.line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round}
.best{stroke:var(--ink);stroke-width:2}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 20px;padding:0;margin:0 0 16px;font-size:.9rem}
.swatch{display:inline-block;width:11px;height:11px;border-radius:3px;background:var(--c);margin-right:8px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.95rem}
th,td{text-align:right;padding:9px 0 9px 20px;border-top:1px solid var(--rule);white-space:nowrap}
thead th{border-top:0;color:var(--soft);font-weight:500;font-size:.85rem}
th:first-child,td:nth-child(2),thead th:nth-child(2){text-align:left}th:first-child{padding-left:0;font-weight:600}
tbody th{white-space:normal;min-width:11em}
dl{display:grid;grid-template-columns:max-content 1fr;gap:6px 24px;margin:12px 0 0;font-size:.95rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
@media (max-width:560px){main{padding:28px 12px}section{padding:18px 16px}dl{grid-template-columns:1fr}
dd{margin-bottom:8px}}
@media print{body{background:none}section{break-inside:avoid}}
""".strip()
