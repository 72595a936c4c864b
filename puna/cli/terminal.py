"""Curves in a terminal: braille dots, eight to a character; letters where lines have no colours to differ by."""

import os
import sys
from collections.abc import Iterator, Sequence

from puna.chart import Axis, Curves, Line, drawable, number_text
from puna.log import harmless

_COLOURS = (34, 33, 32, 35, 36, 31)
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a braille character, by row and column
Cells = dict[tuple[int, int], tuple[int, int]]  # (row, column) -> (series, dots)


def chart(curves: Curves, width: int, height: int = 16, colour: bool = False, braille: bool = True) -> list[str]:
    """Lines of text, at most `width` wide: a legend, `height` lines of curves, the axis.

    Args:
        braille: False where the terminal knows ASCII alone.
    """
    lines = [[drawable(x, y, curves.log_y) for x, y in series.points] for series in curves.series]
    points = [point for line in lines for point in line if point]
    if not points:
        return [f"{harmless(curves.title)}: nothing to draw"]
    dotted = braille and (colour or len(lines) == 1)
    x, y = Axis([x for x, _ in points]), Axis([y for _, y in points], 0.02, curves.log_y)
    rows = {round((1 - at) * (height - 1)): label for at, label in y.ticks() if 0 <= at <= 1}
    margin = max(map(len, rows.values()), default=0) + 1
    columns = max(10, width - margin - 1)
    scale = (4, 2) if dotted else (1, 1)
    cells: Cells = {}
    for number, line in enumerate(lines):
        for across, down in _stroke(line, x, y, columns * scale[1], height * scale[0]):
            place = (down // scale[0], across // scale[1])
            owner, dots = cells.get(place, (number, 0))  # a cell has one colour: that of the last line
            cells[place] = (number, dots * (owner == number) | _DOTS[down % 4][across % 2])
    edge = "│" if braille else "|"
    drawn = [
        f"{rows.get(row, ''):>{margin}}{edge}"
        + "".join(_cell(cells.get((row, column)), dotted, colour) for column in range(columns)).rstrip()
        for row in range(height)
    ]
    names = [_named(i, series.name, lines[i], width, dotted, colour) for i, series in enumerate(curves.series)]
    label = curves.y_label + (", log scale" if curves.log_y else "")
    return [label, *_wrapped(names, width), *drawn, *_x_axis(x, curves.x_label, margin, columns, braille)]


def can_colour() -> bool:
    """Whether standard output is a terminal that shows colours, and its user wants them (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def can_braille() -> bool:
    return (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"


def _stroke(line: Line, x: Axis, y: Axis, columns: int, rows: int) -> Iterator[tuple[int, int]]:
    """(column, row) of every dot: the points, and what lies between two that follow each other."""
    before = None
    for point in line:
        here = None
        if point:
            here = (round(x.at(point[0]) * (columns - 1)), round((1 - y.at(point[1])) * (rows - 1)))
            yield from _between(before, here) if before else [here]
        before = here


def _between(a: tuple[int, int], b: tuple[int, int]) -> Iterator[tuple[int, int]]:
    steps = max(abs(b[0] - a[0]), abs(b[1] - a[1]), 1)
    for i in range(steps + 1):
        yield a[0] + round((b[0] - a[0]) * i / steps), a[1] + round((b[1] - a[1]) * i / steps)


def _cell(found: tuple[int, int] | None, dotted: bool, colour: bool) -> str:
    if found is None:
        return " "
    number, dots = found
    return _painted(chr(0x2800 + dots) if dotted else chr(ord("a") + number % 26), number, colour)


def _painted(text: str, number: int, colour: bool) -> str:
    return f"\x1b[{_COLOURS[number % len(_COLOURS)]}m{text}\x1b[0m" if colour else text


def _named(number: int, name: str, line: Line, width: int, dotted: bool, colour: bool) -> tuple[str, int]:
    """An entry of the legend, and how wide it is shown."""
    last = next((number_text(point[1]) for point in reversed(line) if point), "no values")
    mark = "──" if dotted else chr(ord("a") + number % 26) * 2
    room = width - len(mark) - len(last) - 2
    name = harmless(name) if len(name) <= room else "..." + harmless(name)[3 - room :]  # of a path the end tells most
    return f"{_painted(mark, number, colour)} {name} {last}", len(f"{mark} {name} {last}")


def _wrapped(names: Sequence[tuple[str, int]], width: int) -> list[str]:
    lines, used = [""], 0
    for text, size in names:
        if used and used + 3 + size > width:
            lines, used = [*lines, ""], 0
        lines[-1] += "   " * bool(used) + text
        used += size + 3 * bool(used)
    return lines


def _x_axis(x: Axis, label: str, margin: int, columns: int, braille: bool) -> list[str]:
    marks, corner, dash = [" "] * (columns + 1), "└" if braille else "+", "─" if braille else "-"
    end = -1
    for at, tick in x.ticks():
        start = min(round(at * (columns - 1)) + 1 - len(tick) // 2, columns + 1 - len(tick) - len(label) - 1)
        if start > end and at >= 0:
            marks[start : start + len(tick)] = tick
            end = start + len(tick)
    marks[columns + 1 - len(label) :] = label
    return [" " * margin + corner + dash * columns, " " * margin + "".join(marks)]
