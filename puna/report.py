"""A report: sections of numbers and text in, one HTML file out that opens anywhere and asks the network for nothing."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from puna.files import write_text

Scalar = str | int | float | None
Interval = tuple[float, float, float]  # low, value, high
Point = tuple[float, float]
Line = list[Point | None]  # None: a gap

BUCKETS = 300  # a line keeps the lowest and the highest point of each: about two a pixel on a phone
DASHES = ("none", "7 4", "2 4", "9 3 2 3")  # lines differ in print and to the colour-blind, too
ENDS = [(plane - 2, plane) for plane in range(1 << 16, 18 << 16, 1 << 16)]  # U+FFFE, U+FFFF and their like
FORBIDDEN = [(0x7F, 0xA0), (0xD800, 0xE000), (0xFDD0, 0xFDF0), *ENDS]  # to HTML in any spelling; surrogates to UTF-8
VISIBLE = {code: 0xFFFD for start, stop in FORBIDDEN for code in range(start, stop)}
VISIBLE |= {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}  # control codes have pictures
CSS = """
:root { color-scheme: light dark; --page: #fdfdfb; --ink: #1d2024; --soft: #5a6069; --rule: #dfe1e0; --tint: #eceee9;
  --s0: #1d5fa9; --s1: #b8420b; --s2: #17795a; --s3: #8a3c91; --s4: #7d6400; --s5: #55595f }
@media screen and (prefers-color-scheme: dark) {
  :root { --page: #15181b; --ink: #e6e7e4; --soft: #a3a9b0; --rule: #2b3035; --tint: #262c31;
    --s0: #7db3f0; --s1: #f2955c; --s2: #5fcba4; --s3: #d99ce2; --s4: #dcc055; --s5: #b7bbc0 } }
* { box-sizing: border-box }
html { background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; text-size-adjust: 100% }
body { max-width: 58rem; margin: 0 auto; padding: 2rem 1rem 3rem; overflow-wrap: anywhere }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 }
h2 { font-size: 1.125rem; margin: 2.5rem 0 .5rem } .part { font-size: 1.5rem; margin: 5rem 0 0 }
p, ul, ol, figure { margin: 0; padding: 0; list-style: none }
.soft { color: var(--soft) } .note { color: var(--soft); font-size: .875rem; margin: .25rem 0 .5rem }
.s0 { color: var(--s0) } .s1 { color: var(--s1) } .s2 { color: var(--s2) }
.s3 { color: var(--s3) } .s4 { color: var(--s4) } .s5 { color: var(--s5) }
.legend { display: flex; flex-wrap: wrap; gap: 0 1.5rem; font-size: .875rem } .legend svg { margin-right: .5rem }
svg { overflow: visible } .plot { display: block; width: 100%; height: 20rem; padding: 2rem 1.25rem 3rem 3rem }
.plot text { font-size: .75rem; fill: var(--soft); font-variant-numeric: tabular-nums }
.line { fill: none; stroke: currentColor; stroke-width: 1.25; stroke-linejoin: round; stroke-linecap: round }
.dot { fill: currentColor; stroke: var(--page); stroke-width: 1.5 }
.grid { stroke: var(--rule) } .axis { stroke: var(--soft) } .end { text-anchor: end } .mid { text-anchor: middle }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .375rem 2rem .375rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule) }
th { color: var(--soft); font-weight: 400 } .number { text-align: right; white-space: nowrap }
.scroll, th { overflow-wrap: normal } tr > :last-child { padding-right: 0 }
.bar { width: 6rem; height: .75rem; margin-right: .75rem } .bar .from-to, .bar .value { stroke: currentColor }
.bar .from-to { stroke-width: 5; opacity: .5 } .bar .value { stroke-width: 2 }
.samples li { display: grid; grid-template-columns: 6.5rem 1fr; padding: .5rem 0; border-top: 1px solid var(--rule) }
.text { white-space: pre-wrap; font: .875rem/1.6 ui-monospace, monospace } .text b { background: var(--tint) }
@media (max-width: 36rem) { .plot { height: 16rem } .bar { width: 2.75rem; margin-right: .5rem }
  th, td { padding-right: .75rem } .samples li { display: block } }
@media print { html { background: none } figure, table, .samples li { break-inside: avoid } h2 { break-after: avoid } }
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


@dataclass(frozen=True)
class Table:
    """All intervals are drawn on one scale, so that rows and columns compare: give another unit another table."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Scalar | Interval]]
    note: str = ""


@dataclass(frozen=True)
class Samples:
    """What the model wrote over time: (step, prompt, continuation)."""

    title: str
    samples: Sequence[tuple[int, str, str]]


@dataclass(frozen=True)
class Facts:
    """Name -> value; a pair is (predicted, measured)."""

    title: str
    facts: Mapping[str, Scalar | tuple[Scalar, Scalar]]


@dataclass(frozen=True)
class Heading:
    """Begins a part of a page that tells of several runs."""

    title: str
    text: str


@dataclass(frozen=True)
class Report:
    title: str
    subtitle: str
    sections: Sequence["Section"]


Section = Heading | Curves | Table | Samples | Facts


def write_report(path: Path, report: Report) -> None:
    """Replace `path` with the page; a reader never meets half of one."""
    title = _text(report.title)
    sections = "".join(_section(number, section) for number, section in enumerate(report.sections))
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{CSS}</style>
</head>
<body>
<header><h1>{title}</h1><p class="soft">{_text(report.subtitle)}</p></header>
<main>{sections}
</main>
</body>
</html>
"""
    write_text(path, page)


def _section(number: int, section: Section) -> str:
    match section:
        case Heading():
            return f'\n<h2 class="part">{_text(section.title)}</h2>\n<p class="soft">{_text(section.text)}</p>'
        case Curves():
            body = _curves(number, section)
        case Table():
            body = _table(number, section)
        case Samples():
            body = _samples(section)
        case Facts():
            body = _facts(section)
    return f'\n<section>\n<h2 id="h{number}">{_text(section.title)}</h2>\n{body}\n</section>'


def _curves(number: int, curves: Curves) -> str:
    lines: list[Line] = [[_drawable(x, y, curves.log_y) for x, y in series.points] for series in curves.series]
    drawn = [point for line in lines for point in line if point]
    legend = "".join(_legend(i, curves.series[i], line) for i, line in enumerate(lines))
    plot = _plot(number, curves, lines, drawn) if drawn else '<p class="note">Nothing to draw.</p>'
    return f'<figure><figcaption><ul class="legend">{legend}</ul></figcaption>\n{plot}</figure>'


def _drawable(x: float, y: float | None, log_y: bool) -> Point | None:
    if y is None or not (abs(x) < 1e99 and abs(y) < 1e99) or (log_y and y < 1e-99):  # "not <" holds for NaN
        return None
    return x, y


def _legend(i: int, series: Series, line: Line) -> str:
    last = next((f"last {_number(point[1])}" for point in reversed(line) if point), "no values")
    gaps = f", {line.count(None):,} not drawn" if None in line else ""
    mark = '<circle class="dot" cx="14" cy="5" r="4"/>' if series.dots else ""
    return (
        f'<li><svg class="s{i % 6}" width="28" height="10" aria-hidden="true"><path class="line" d="M0 5H28"'
        f' stroke-dasharray="{DASHES[i % 4]}"/>{mark}</svg>{_text(series.name)}'
        f' <span class="soft">{last}{gaps}</span></li>'
    )


def _plot(number: int, curves: Curves, lines: list[Line], drawn: list[Point]) -> str:
    """Text and dots are placed in percent and keep their size on every screen; only the lines stretch."""
    heights = [y for _, y in drawn]
    x, y = _Axis([x for x, _ in drawn]), _Axis(heights, 0.05, curves.log_y)
    x_label, y_label = _text(curves.x_label), _text(curves.y_label + (", log scale" if curves.log_y else ""))
    told = ", ".join(series.name for series in curves.series) + f": {_span(min(heights), max(heights))}"
    parts = [f'<svg class="plot" role="img" aria-labelledby="t{number} d{number}">']
    parts.append(f'<title id="t{number}">{y_label} over {x_label}</title><desc id="d{number}">{_text(told)}</desc>')
    for at, tick in y.ticks():
        parts.append(f'<line class="grid" x2="100%" y1="{1 - at:.2%}" y2="{1 - at:.2%}"/>')
        parts.append(f'<text class="end" dx="-8" y="{1 - at:.2%}" dy=".32em">{tick}</text>')
    for at, tick in x.ticks():
        parts.append(f'<line class="grid" x1="{at:.2%}" x2="{at:.2%}" y2="100%"/>')
        parts.append(f'<text class="mid" x="{at:.2%}" y="100%" dy="1.5em">{tick}</text>')
    parts.append('<line class="axis" x2="100%" y1="100%" y2="100%"/>')
    parts.append(f'<text dx="-48" dy="-14">{y_label}</text>')
    parts.append(f'<text class="end" x="100%" y="100%" dy="2.9em">{x_label}</text>')
    parts += [_line(i, curves.series[i], _thin(line), x, y) for i, line in enumerate(lines)]
    return "\n".join([*parts, "</svg>"])


def _thin(line: Line) -> Line:
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


def _line(i: int, series: Series, line: Line, x: "_Axis", y: "_Axis") -> str:
    path, pen, dots = "", "M", ""
    for point in line:
        if point:
            across, down = x.at(point[0]), 1 - y.at(point[1])
            path += f"{pen}{1000 * across:.1f} {1000 * down:.1f}" + "h0" * (pen == "M")  # h0: a lone point shows
            told = f"<title>{_number(point[0])}: {_number(point[1])}</title>"
            dots += f'<circle class="dot" cx="{across:.2%}" cy="{down:.2%}" r="4">{told}</circle>' * series.dots
        pen = "L" if point else "M"
    return (
        f'<g class="s{i % 6}"><svg viewBox="0 0 1000 1000" preserveAspectRatio="none" width="100%" height="100%">'
        f'<path class="line" vector-effect="non-scaling-stroke" stroke-dasharray="{DASHES[i % 4]}" d="{path}"/>'
        f"</svg>{dots}</g>"
    )


class _Axis:
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
    return _short(f"{value:,.10g}")


def _table(number: int, table: Table) -> str:
    columns = [[row[i] for row in table.rows] for i in range(len(table.columns))]
    ends = [end for column in columns for cell in column if isinstance(cell, tuple) for end in cell if abs(end) < 1e99]
    axis = _Axis(ends) if ends else None
    drawn = [_column(name, cells, axis) for name, cells in zip(table.columns, columns, strict=True)]
    rows = ["<tr>" + "".join(cells) + "</tr>\n" for cells in zip(*drawn, strict=True)]
    note = table.note + (f" Bars: one scale, {_span(min(ends), max(ends))}." if ends else "")
    return (
        f'<div class="scroll" role="region" aria-labelledby="h{number}" tabindex="0"><table>'
        f"<thead>{''.join(rows[:1])}</thead>"
        f"<tbody>{''.join(rows[1:])}</tbody></table></div>"
        f'<p class="note">{_text(note)}</p>'
    )


def _column(name: str, cells: Sequence[Scalar | Interval], axis: _Axis | None) -> list[str]:
    """Heading and cells. Floats get the same decimals, so that digits stand under digits."""
    kind = "" if any(isinstance(cell, str) for cell in cells) else ' class="number"'
    values = [cell[1] if isinstance(cell, tuple) else cell for cell in cells]
    form = _shared_format([value for value in values if isinstance(value, float)])
    bars = [_bar(cell, axis) if isinstance(cell, tuple) and axis else "" for cell in cells]
    drawn = [f"<td{kind}>{bar}{_scalar(value, form)}</td>" for value, bar in zip(values, bars, strict=True)]
    return [f'<th scope="col"{kind}>{_text(name)}</th>', *drawn]


def _bar(interval: Interval, axis: _Axis) -> str:
    if not all(abs(end) < 1e99 for end in interval):
        return ""
    low, value, high = (f"{axis.at(end):.2%}" for end in interval)
    return (
        f'<svg class="bar s0" role="img"><title>{_span(interval[0], interval[2])}</title>'
        '<line class="grid" x2="100%" y1="50%" y2="50%"/>'
        f'<line class="from-to" x1="{low}" x2="{high}" y1="50%" y2="50%"/>'
        f'<line class="value" x1="{value}" x2="{value}" y2="100%"/></svg>'
    )


def _samples(samples: Samples) -> str:
    items = [
        f'<li><p class="soft">step {step:,}</p><p class="text" dir="auto"><b>{_text(prompt)}</b>{_text(text)}</p></li>'
        for step, prompt, text in samples.samples
    ]
    return f'<p class="note">Bold: the prompt. The rest is the model.</p>\n<ol class="samples">{"".join(items)}</ol>'


def _facts(facts: Facts) -> str:
    pairs = any(isinstance(value, tuple) for value in facts.facts.values())
    head = '<tr><td></td><th scope="col">predicted</th><th scope="col">measured</th></tr>\n' if pairs else ""
    rows = ""
    for name, value in facts.facts.items():
        cells = value if isinstance(value, tuple) else (value,)
        span = ' colspan="2"' if pairs and len(cells) == 1 else ""
        drawn = "".join(f"<td{span}>{_scalar(cell)}</td>" for cell in cells)
        rows += f'<tr><th scope="row">{_text(name)}</th>{drawn}</tr>\n'
    return f"<table>{head}{rows}</table>"


def _scalar(value: Scalar, form: str = "") -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return format(value, form) if form else _number(value)
    return _text(value) if isinstance(value, str) else f"{value:,}"


def _span(low: float, high: float) -> str:
    return f"{_number(low)} to {_number(high)}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else _short(f"{value:,.4g}")


def _short(number: str) -> str:
    """1e-06 -> 1e-6."""
    return number.replace("e+", "e").replace("e-0", "e-")


def _shared_format(values: list[float]) -> str:
    """Four digits of the largest, fewer where they are zeros; "" when the sizes are too far apart for one format."""
    sizes = [abs(value) for value in values if 0 < abs(value) < 1e15]
    if not sizes or not 1e-4 < max(sizes) < 1e3 * min(sizes):
        return ""
    most = max(0, 3 - math.floor(math.log10(max(sizes))))
    needed = next(d for d in range(most + 1) if all(round(size, d) == round(size, most) for size in sizes))
    return f",.{needed}f"


def _text(text: str) -> str:
    return html.escape(text.translate(VISIBLE))
