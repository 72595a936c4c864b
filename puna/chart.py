"""Curves: series of points on shared axes, as SVG for a page and as round numbers for whoever else draws them."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float]
Line = list[Point | None]  # None: a gap

BUCKETS = 300  # a line keeps the lowest and the highest point of each: about two a pixel on a phone
DASHES = ("none", "7 4", "2 4", "9 3 2 3")  # lines differ in print and to the colour-blind, too
ENDS = [(plane - 2, plane) for plane in range(1 << 16, 18 << 16, 1 << 16)]  # U+FFFE, U+FFFF and their like
FORBIDDEN = [(0x7F, 0xA0), (0xD800, 0xE000), (0xFDD0, 0xFDF0), *ENDS]  # to HTML in any spelling; surrogates to UTF-8
VISIBLE = {code: 0xFFFD for start, stop in FORBIDDEN for code in range(start, stop)}
VISIBLE |= {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}  # control codes have pictures
PLOT_CSS = """
:root { color-scheme: light dark; --page: #fdfdfb; --ink: #1d2024; --soft: #5a6069; --rule: #dfe1e0; --tint: #eceee9;
  --s0: #1d5fa9; --s1: #b8420b; --s2: #17795a; --s3: #8a3c91; --s4: #7d6400; --s5: #55595f }
@media screen and (prefers-color-scheme: dark) {
  :root { --page: #15181b; --ink: #e6e7e4; --soft: #a3a9b0; --rule: #2b3035; --tint: #262c31;
    --s0: #7db3f0; --s1: #f2955c; --s2: #5fcba4; --s3: #d99ce2; --s4: #dcc055; --s5: #b7bbc0 } }
.s0 { color: var(--s0) } .s1 { color: var(--s1) } .s2 { color: var(--s2) }
.s3 { color: var(--s3) } .s4 { color: var(--s4) } .s5 { color: var(--s5) }
.plot text { font-size: .75rem; fill: var(--soft); font-variant-numeric: tabular-nums }
.line { fill: none; stroke: currentColor; stroke-width: 1.25; stroke-linejoin: round; stroke-linecap: round }
.dot { fill: currentColor; stroke: var(--page); stroke-width: 1.5 }
.grid { stroke: var(--rule) } .axis { stroke: var(--soft) } .end { text-anchor: end } .mid { text-anchor: middle }
"""


@dataclass(frozen=True)
class Series:
    """With `dots` the points are marked: for few, exact measurements such as validation."""

    name: str
    points: Sequence[tuple[float, float | None]]
    dots: bool = False


@dataclass(frozen=True)
class Curves:
    """Series on shared axes. What cannot be drawn (None, NaN, infinite, <= 0 under `log_y`) breaks its line."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    log_y: bool = False


def figure(number: int, curves: Curves) -> str:
    """As a part of a page; `number` keeps its ids apart from those of the page's other figures."""
    lines, drawn = _lines(curves)
    legend = "".join(_legend(i, curves.series[i], line) for i, line in enumerate(lines))
    size = 'class="plot box"'
    plot = _plot(number, curves, lines, drawn, size) if drawn else '<p class="note">Nothing to draw.</p>'
    return f'<figure><figcaption><ul class="legend">{legend}</ul></figcaption>\n{plot}</figure>'


def picture(curves: Curves) -> str:
    """As an SVG file of its own, light or dark as its reader's screen is."""
    lines, drawn = _lines(curves)
    columns = 3 if max((len(series.name) for series in curves.series), default=0) < 28 else 1
    rows, legend = -(-len(lines) // columns), ""
    for i, (series, line) in enumerate(zip(curves.series, lines, strict=True)):
        x, y = 16 + i % columns * 312, 28 + i // columns * 22
        dash, name, last = DASHES[i % 4], text_of(series.name), text_of(_last(line))
        legend += (
            f'<g class="s{i % 6}"><path class="line" d="M{x} {y - 4}h28" stroke-dasharray="{dash}"/></g>'
            f'<text class="name" x="{x + 36}" y="{y}">{name}<tspan class="soft" dx="6">{last}</tspan></text>\n'
        )
    top = 56 + 22 * rows
    size = f'class="plot" x="72" y="{top}" width="864" height="300" overflow="visible"'
    plot = _plot(0, curves, lines, drawn, size) if drawn else f'<text x="16" y="{top}">Nothing to draw.</text>'
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 {top + 356}" width="960" height="{top + 356}">
<style>{PLOT_CSS}text {{ font: 14px system-ui, sans-serif; fill: var(--ink) }} .soft {{ fill: var(--soft) }}
.plot text {{ font-size: 12px }} .back {{ fill: var(--page) }}</style>
<rect class="back" width="100%" height="100%"/>
{legend}{plot}
</svg>
"""


def _lines(curves: Curves) -> tuple[list[Line], list[Point]]:
    """The line of each series, and all points that can be drawn."""
    lines = [[drawable(x, y, curves.log_y) for x, y in series.points] for series in curves.series]
    return lines, [point for line in lines for point in line if point]


def drawable(x: float, y: float | None, log_y: bool) -> Point | None:
    if y is None or not (abs(x) < 1e99 and abs(y) < 1e99) or (log_y and y < 1e-99):  # "not <" holds for NaN
        return None
    return x, y


def _legend(i: int, series: Series, line: Line) -> str:
    gaps = f", {line.count(None):,} not drawn" if None in line else ""
    mark = '<circle class="dot" cx="14" cy="5" r="4"/>' if series.dots else ""
    return (
        f'<li><svg class="s{i % 6}" width="28" height="10" aria-hidden="true"><path class="line" d="M0 5H28"'
        f' stroke-dasharray="{DASHES[i % 4]}"/>{mark}</svg>{text_of(series.name)}'
        f' <span class="soft">{_last(line)}{gaps}</span></li>'
    )


def _last(line: Line) -> str:
    return next((f"last {number_text(point[1])}" for point in reversed(line) if point), "no values")


def _plot(number: int, curves: Curves, lines: list[Line], drawn: list[Point], size: str) -> str:
    """Text and dots are placed in percent and keep their size on every screen; only the lines stretch."""
    heights = [y for _, y in drawn]
    x, y = Axis([x for x, _ in drawn]), Axis(heights, 0.05, curves.log_y)
    x_label, y_label = text_of(curves.x_label), text_of(curves.y_label + (", log scale" if curves.log_y else ""))
    told = ", ".join(series.name for series in curves.series) + f": {span(min(heights), max(heights))}"
    parts = [f'<svg {size} role="img" aria-labelledby="t{number} d{number}">']
    parts.append(f'<title id="t{number}">{y_label} over {x_label}</title><desc id="d{number}">{text_of(told)}</desc>')
    for at, tick in y.ticks():
        parts.append(f'<line class="grid" x2="100%" y1="{1 - at:.2%}" y2="{1 - at:.2%}"/>')
        parts.append(f'<text class="end" dx="-8" y="{1 - at:.2%}" dy=".32em">{tick}</text>')
    for at, tick in x.ticks():
        parts.append(f'<line class="grid" x1="{at:.2%}" x2="{at:.2%}" y2="100%"/>')
        parts.append(f'<text class="mid" x="{at:.2%}" y="100%" dy="1.5em">{tick}</text>')
    parts.append('<line class="axis" x2="100%" y1="100%" y2="100%"/>')
    parts.append(f'<text dx="-48" dy="-14">{y_label}</text>')
    parts.append(f'<text class="end" x="100%" y="100%" dy="2.9em">{x_label}</text>')
    parts += [_line(i, curves.series[i], thin(line), x, y) for i, line in enumerate(lines)]
    return "\n".join([*parts, "</svg>"])


def thin(line: Line) -> Line:
    """The lowest and highest point of each bucket, a gap wherever one was: neither spikes nor holes get lost."""
    kept: list[int] = []
    for part in (range(b * len(line) // BUCKETS, (b + 1) * len(line) // BUCKETS) for b in range(BUCKETS)):
        heights = {i: point[1] for i in part if (point := line[i])}
        if heights:
            kept += sorted({min(heights, key=heights.__getitem__), max(heights, key=heights.__getitem__)})
    thin: Line = []
    for i, following in zip(kept, [*kept[1:], len(line)], strict=True):
        thin += [line[i], None] if None in line[i:following] else [line[i]]
    return thin


def _line(i: int, series: Series, line: Line, x: "Axis", y: "Axis") -> str:
    path, pen, dots = "", "M", ""
    for point in line:
        if point:
            across, down = x.at(point[0]), 1 - y.at(point[1])
            path += f"{pen}{1000 * across:.1f} {1000 * down:.1f}" + "h0" * (pen == "M")  # h0: a lone point shows
            told = f"<title>{number_text(point[0])}: {number_text(point[1])}</title>"
            dots += f'<circle class="dot" cx="{across:.2%}" cy="{down:.2%}" r="4">{told}</circle>' * series.dots
        pen = "L" if point else "M"
    return (
        f'<g class="s{i % 6}"><svg viewBox="0 0 1000 1000" preserveAspectRatio="none" width="100%" height="100%">'
        f'<path class="line" vector-effect="non-scaling-stroke" stroke-dasharray="{DASHES[i % 4]}" d="{path}"/>'
        f"</svg>{dots}</g>"
    )


class Axis:
    """Places values between 0 and 1."""

    def __init__(self, values: list[float], margin: float = 0.0, log: bool = False):
        self.log, self.scale = log, math.log10 if log else float
        low, high = self.scale(min(values)), self.scale(max(values))
        pad = margin * (high - low)
        if high - low <= 1e-9 * max(abs(low), abs(high)) + 1e-99:  # one value, or as good as one
            pad = abs(low) / 10 if abs(low) > 1e-90 else 1.0
        self.low, self.high = low - pad, high + pad

    def at(self, value: float) -> float:
        return (self.scale(value) - self.low) / (self.high - self.low)

    def ticks(self) -> list[tuple[float, str]]:
        """(place, label) of a handful of round numbers."""
        values = _round_logs(self.low, self.high) if self.log else _round_numbers(self.low, self.high)
        thousands = max(map(abs, values), default=0) >= 1e4
        return [(self.at(value), _tick(value, thousands)) for value in values]


def _round_numbers(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, at most seven."""
    size = 10.0 ** math.floor(math.log10((high - low) / 6))
    step = next(size * digit for digit in (1, 2, 5, 10) if size * digit >= (high - low) / 6.001)
    return [i * step for i in range(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1)]


def _round_logs(low: float, high: float) -> list[float]:
    """Powers of ten from 10**low to 10**high; where they are too few, 1, 2 and 5 times them or any round numbers."""
    powers = [10.0**power for power in range(math.ceil(low), math.floor(high) + 1)]
    if len(powers) > 2:
        return powers[:: math.ceil(len(powers) / 7)]
    digits = [digit * 10.0**power for power in range(math.floor(low), math.ceil(high)) for digit in (1, 2, 5)]
    inside = [value for value in digits if low <= math.log10(value) <= high]
    return inside if len(inside) > 2 else _round_numbers(10**low, 10**high)


def _tick(value: float, thousands: bool) -> str:
    for unit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if unit <= abs(value) < 1e15 and (thousands or unit > 1e3):
            return f"{value / unit:.10g}{suffix}"
    return short(f"{value:,.10g}")


def span(low: float, high: float) -> str:
    return f"{number_text(low)} to {number_text(high)}"


def number_text(value: float) -> str:
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else short(f"{value:,.4g}")


def short(number: str) -> str:
    """1e-06 -> 1e-6."""
    return number.replace("e+", "e").replace("e-0", "e-")


def text_of(text: str) -> str:
    return html.escape(text.translate(VISIBLE))
