"""Hand-drawn SVG charts, styled by the page's CSS classes, each with a title and a description for screen readers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape

WIDTH = 720
_CHARACTER = 7.2
"""Width of an average character of the 13-pixel labels, in pixels; errs on the wide side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """One bar or point: `series` (0, 1, 2 …) picks its colour; `x` is only used by scatter plots."""

    label: str
    y: float
    series: int = 0
    x: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Maps data to pixels, linearly or by logarithm, and knows where its ticks go."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        share = ((math.log(value) if self.log else value) - low) / (high - low)
        return self.start + share * (self.end - self.start)


def linear_scale(values: Sequence[float], start: float, end: float) -> Scale:
    """A scale over the values, rounded outwards to about five steps of 1, 2 or 5 times a power of ten.

    Values that differ in nothing but how they were rounded are one value.
    """
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    span = high - low if high - low > 1e-9 * size else size or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= span / 4)
    first, last = math.floor(low / step), math.ceil(high / step)
    last = max(last, first + 1)
    digits = 10 - math.floor(math.log10(step))
    ticks = tuple(round(i * step, digits) for i in range(first, last + 1))
    return Scale(low=ticks[0], high=ticks[-1], start=start, end=end, ticks=ticks)


def log_scale(values: Sequence[float], start: float, end: float) -> Scale:
    """A logarithmic scale over positive values with a margin, ticks at 1, 2, 5 × 10^n or, over 2 decades, 10^n."""
    low, high = min(values) / 1.5, max(values) * 1.5
    steps = (1,) if high / low > 200 else (1, 2, 5)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = tuple(m * 10.0**d for d in decades for m in steps if low <= m * 10.0**d <= high)
    return Scale(low=low, high=high, start=start, end=end, ticks=ticks, log=True)


def bar_chart(bars: Sequence[Mark], *, title: str, description: str) -> str:
    """Horizontal bars from zero, each with its label to the left and its value at its end."""
    row, bar_height = 34, 18
    left = min(250.0, 14 + max(len(b.label) for b in bars) * _CHARACTER)
    right = WIDTH - 64.0
    longest = max(max(b.y for b in bars), 1e-9)
    body = []
    for i, bar in enumerate(bars):
        middle = i * row + row / 2
        width = bar.y / longest * (right - left)
        body.append(
            f"<g><title>{escape(bar.label)}: {bar.y:.4f}</title>"
            f'<text class="label" x="{left - 10:.1f}" y="{middle + 4.5:.1f}" text-anchor="end">'
            f"{escape(_shorten(bar.label, left - 10))}</text>"
            f'<rect class="series-{bar.series}" x="{left:.1f}" y="{middle - bar_height / 2:.1f}" '
            f'width="{max(width, 1):.1f}" height="{bar_height}" rx="3"/>'
            f'<text class="value" x="{left + width + 8:.1f}" y="{middle + 4.5:.1f}">{bar.y:.3f}</text></g>'
        )
    axis = f'<line class="axis" x1="{left:.1f}" x2="{left:.1f}" y1="0" y2="{len(bars) * row}"/>'
    return _svg("".join(body) + axis, len(bars) * row, title, description)


def scatter_chart(points: Sequence[Mark], *, x_label: str, y_label: str, title: str, description: str) -> str:
    """Points over a logarithmic x axis, labelled in place, with the frontier of those that none beats on both axes."""
    height, left, top = 360, 58.0, 26.0
    x = log_scale([p.x for p in points], left, WIDTH - 24.0)
    y = linear_scale([p.y for p in points], height - 48.0, top)
    frontier = [p for p in sorted(points, key=lambda p: p.x) if not any(_beats(other, p) for other in points)]
    path = " ".join(f"{x(p.x):.1f},{y(p.y):.1f}" for p in frontier)
    line = f'<polyline class="frontier" points="{path}"/>' if len(frontier) > 1 else ""
    spots = [(x(p.x), y(p.y)) for p in points]
    taken = [(px - 8, py - 8, px + 8, py + 8) for px, py in spots]
    body = []
    for point, (px, py) in zip(points, spots, strict=True):
        text = _shorten(point.label, 240)
        label_x, label_y, anchor = _place_label(px, py, len(text) * _CHARACTER, taken, height)
        body.append(
            f"<g><title>{escape(point.label)}: {point.y:.4f}, {point.x:,.0f} pairs/s</title>"
            f'<circle class="series-{point.series}" cx="{px:.1f}" cy="{py:.1f}" r="7"/>'
            f'<text class="label halo" x="{label_x:.1f}" y="{label_y:.1f}" text-anchor="{anchor}">'
            f"{escape(text)}</text></g>"
        )
    axes = _axes(x, y, height, x_label, y_label, x_text=_short_number)
    return _svg(axes + line + "".join(body), height, title, description)


def line_chart(
    points: Sequence[tuple[float, float]],
    *,
    x_label: str,
    y_label: str,
    title: str,
    description: str,
    series: int = 0,
    highlight: tuple[float, float] | None = None,
) -> str:
    """One line over a linear x axis; `highlight` is a point of it to mark with its value."""
    height, left, top = 240, 58.0, 26.0
    x = linear_scale([p[0] for p in points], left, WIDTH - 32.0)
    last = max(p[0] for p in points)
    x = replace(x, high=last) if last > x.low else x
    y = linear_scale([p[1] for p in points], height - 48.0, top)
    path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
    body = f'<polyline class="line series-{series}" points="{path}"/>'
    if len(points) <= 40:
        body += "".join(f'<circle class="series-{series}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="3"/>' for a, b in points)
    if highlight:
        hx, hy = x(highlight[0]), y(highlight[1])
        anchor = "end" if hx > WIDTH / 2 else "start"
        body += (
            f'<circle class="series-{series} best" cx="{hx:.1f}" cy="{hy:.1f}" r="6"/>'
            f'<text class="value halo" x="{hx:.1f}" y="{hy - 12:.1f}" text-anchor="{anchor}">{highlight[1]:.3f} '
            f"at step {highlight[0]:,.0f}</text>"
        )
    axes = _axes(x, y, height, x_label, y_label, x_text=lambda v: f"{v:,.0f}")
    return _svg(axes + body, height, title, description)


def _axes(x: Scale, y: Scale, height: float, x_label: str, y_label: str, x_text: Callable[[float], str]) -> str:
    bottom = height - 48.0
    digits = max(0, -math.floor(math.log10(y.ticks[1] - y.ticks[0]) + 1e-9))
    parts = [
        f'<line class="grid" x1="{x.start}" x2="{x.end}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
        f'<text class="tick" x="{x.start - 8}" y="{y(t) + 4:.1f}" text-anchor="end">{t:.{digits}f}</text>'
        for t in y.ticks
    ]
    parts += [
        f'<line class="axis" x1="{x(t):.1f}" x2="{x(t):.1f}" y1="{bottom}" y2="{bottom + 5}"/>'
        f'<text class="tick" x="{x(t):.1f}" y="{bottom + 19}" text-anchor="middle">{x_text(t)}</text>'
        for t in x.ticks
        if x.low <= t <= x.high
    ]
    parts.append(f'<line class="axis" x1="{x.start}" x2="{x.end}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text class="axis-label" x="{x.end}" y="{height - 6}" text-anchor="end">{escape(x_label)}</text>')
    parts.append(f'<text class="axis-label" x="0" y="12">{escape(y_label)}</text>')
    return "".join(parts)


def _place_label(
    px: float, py: float, width: float, taken: list[tuple[float, float, float, float]], height: float
) -> tuple[float, float, str]:
    """A point's label as (x, baseline y, text-anchor): the first of eight places around it that overlaps nothing."""
    places = [
        (px + 13, py + 4.5, "start"),
        (px - 13, py + 4.5, "end"),
        (px, py - 14, "middle"),
        (px, py + 23, "middle"),
        (px + 8, py - 11, "start"),
        (px + 8, py + 20, "start"),
        (px - 8, py - 11, "end"),
        (px - 8, py + 20, "end"),
    ]
    boxes = [_label_box(place, width) for place in places]
    free = [i for i, box in enumerate(boxes) if _inside(box, height) and not any(_overlap(box, t) for t in taken)]
    chosen = free[0] if free else int(boxes[0][2] > WIDTH)
    taken.append(boxes[chosen])
    return places[chosen]


def _label_box(place: tuple[float, float, str], width: float) -> tuple[float, float, float, float]:
    x, y, anchor = place
    left = x - {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor] * width
    return (left, y - 12, left + width, y + 3)


def _inside(box: tuple[float, float, float, float], height: float) -> bool:
    return box[0] >= 60 and box[2] <= WIDTH and box[1] >= 14 and box[3] <= height - 50


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _beats(a: Mark, b: Mark) -> bool:
    return a.x >= b.x and a.y >= b.y and (a.x, a.y) != (b.x, b.y)


def _shorten(text: str, pixels: float) -> str:
    room = max(4, int(pixels / _CHARACTER))
    return text if len(text) <= room else text[: room - 1] + "…"


def _short_number(value: float) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _svg(body: str, height: float, title: str, description: str) -> str:
    # The label is an attribute, not a <title>: that one would pop up over the whole chart and hide the marks' own.
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(title)}">'
        f"<desc>{escape(description)}</desc>{body}</svg>"
    )
