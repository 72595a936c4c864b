"""A report: sections of numbers and text in, one HTML file out that opens anywhere and asks the network for nothing."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from puna.chart import PLOT_CSS, Axis, Curves, figure, number_text, span, text_of
from puna.files import write_text

Scalar = str | int | float | None
Interval = tuple[float, float, float]  # low, value, high


CSS = (
    PLOT_CSS
    + """* { box-sizing: border-box }
html { background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; text-size-adjust: 100% }
body { max-width: 58rem; margin: 0 auto; padding: 2rem 1rem 3rem; overflow-wrap: anywhere }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 }
h2 { font-size: 1.125rem; margin: 2.5rem 0 .5rem } .part { font-size: 1.5rem; margin: 5rem 0 0 }
p, ul, ol, figure { margin: 0; padding: 0; list-style: none }
.soft { color: var(--soft) } .note { color: var(--soft); font-size: .875rem; margin: .25rem 0 .5rem }
.legend { display: flex; flex-wrap: wrap; gap: 0 1.5rem; font-size: .875rem } .legend svg { margin-right: .5rem }
svg { overflow: visible } .box { display: block; width: 100%; height: 20rem; padding: 2rem 1.25rem 3rem 3rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .375rem 2rem .375rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule) }
th { color: var(--soft); font-weight: 400 } .number { text-align: right; white-space: nowrap }
.scroll, th { overflow-wrap: normal } tr > :last-child { padding-right: 0 }
.bar { width: 6rem; height: .75rem; margin-right: .75rem } .bar .from-to, .bar .value { stroke: currentColor }
.bar .from-to { stroke-width: 5; opacity: .5 } .bar .value { stroke-width: 2 }
.samples li { display: grid; grid-template-columns: 6.5rem 1fr; padding: .5rem 0; border-top: 1px solid var(--rule) }
.text { white-space: pre-wrap; font: .875rem/1.6 ui-monospace, monospace } .text b { background: var(--tint) }
@media (max-width: 36rem) { .box { height: 16rem } .bar { width: 2.75rem; margin-right: .5rem }
  th, td { padding-right: .75rem } .samples li { display: block } }
@media print { html { background: none } figure, table, .samples li { break-inside: avoid } h2 { break-after: avoid } }
"""
)


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
    title = text_of(report.title)
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
<header><h1>{title}</h1><p class="soft">{text_of(report.subtitle)}</p></header>
<main>{sections}
</main>
</body>
</html>
"""
    write_text(path, page)


def _section(number: int, section: Section) -> str:
    match section:
        case Heading():
            return f'\n<h2 class="part">{text_of(section.title)}</h2>\n<p class="soft">{text_of(section.text)}</p>'
        case Curves():
            body = figure(number, section)
        case Table():
            body = _table(number, section)
        case Samples():
            body = _samples(section)
        case Facts():
            body = _facts(section)
    return f'\n<section>\n<h2 id="h{number}">{text_of(section.title)}</h2>\n{body}\n</section>'


def _table(number: int, table: Table) -> str:
    columns = [[row[i] for row in table.rows] for i in range(len(table.columns))]
    ends = [end for column in columns for cell in column if isinstance(cell, tuple) for end in cell if abs(end) < 1e99]
    axis = Axis(ends) if ends else None
    drawn = [_column(name, cells, axis) for name, cells in zip(table.columns, columns, strict=True)]
    rows = ["<tr>" + "".join(cells) + "</tr>\n" for cells in zip(*drawn, strict=True)]
    note = table.note + (f" Bars: one scale, {span(min(ends), max(ends))}." if ends else "")
    return (
        f'<div class="scroll" role="region" aria-labelledby="h{number}" tabindex="0"><table>'
        f"<thead>{''.join(rows[:1])}</thead>"
        f"<tbody>{''.join(rows[1:])}</tbody></table></div>"
        f'<p class="note">{text_of(note)}</p>'
    )


def _column(name: str, cells: Sequence[Scalar | Interval], axis: Axis | None) -> list[str]:
    """Heading and cells. Floats get the same decimals, so that digits stand under digits."""
    kind = "" if any(isinstance(cell, str) for cell in cells) else ' class="number"'
    values = [cell[1] if isinstance(cell, tuple) else cell for cell in cells]
    form = _shared_format([value for value in values if isinstance(value, float)])
    bars = [_bar(cell, axis) if isinstance(cell, tuple) and axis else "" for cell in cells]
    drawn = [f"<td{kind}>{bar}{_scalar(value, form)}</td>" for value, bar in zip(values, bars, strict=True)]
    return [f'<th scope="col"{kind}>{text_of(name)}</th>', *drawn]


def _bar(interval: Interval, axis: Axis) -> str:
    if not all(abs(end) < 1e99 for end in interval):
        return ""
    low, value, high = (f"{axis.at(end):.2%}" for end in interval)
    return (
        f'<svg class="bar s0" role="img"><title>{span(interval[0], interval[2])}</title>'
        '<line class="grid" x2="100%" y1="50%" y2="50%"/>'
        f'<line class="from-to" x1="{low}" x2="{high}" y1="50%" y2="50%"/>'
        f'<line class="value" x1="{value}" x2="{value}" y2="100%"/></svg>'
    )


def _samples(samples: Samples) -> str:
    items = [
        f'<li><p class="soft">step {at:,}</p><p class="text" dir="auto"><b>{text_of(ask)}</b>{text_of(more)}</p></li>'
        for at, ask, more in samples.samples
    ]
    return f'<p class="note">Bold: the prompt. The rest is the model.</p>\n<ol class="samples">{"".join(items)}</ol>'


def _facts(facts: Facts) -> str:
    pairs = any(isinstance(value, tuple) for value in facts.facts.values())
    head = '<tr><td></td><th scope="col">predicted</th><th scope="col">measured</th></tr>\n' if pairs else ""
    rows = ""
    for name, value in facts.facts.items():
        cells = value if isinstance(value, tuple) else (value,)
        wide = ' colspan="2"' if pairs and len(cells) == 1 else ""
        drawn = "".join(f"<td{wide}>{_scalar(cell)}</td>" for cell in cells)
        rows += f'<tr><th scope="row">{text_of(name)}</th>{drawn}</tr>\n'
    return f"<table>{head}{rows}</table>"


def _scalar(value: Scalar, form: str = "") -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return format(value, form) if form else number_text(value)
    if isinstance(value, bool):
        return str(value).lower()
    return text_of(value) if isinstance(value, str) else f"{value:,}"


def _shared_format(values: list[float]) -> str:
    """Four digits of the largest, fewer where they are zeros; "" when the sizes are too far apart for one format."""
    sizes = [abs(value) for value in values if 0 < abs(value) < 1e15]
    if not sizes or not 1e-4 < max(sizes) < 1e3 * min(sizes):
        return ""
    most = max(0, 3 - math.floor(math.log10(max(sizes))))
    needed = next(d for d in range(most + 1) if all(round(size, d) == round(size, most) for size in sizes))
    return f",.{needed}f"
