"""The report opens anywhere, asks the network for nothing, and shows what happened: spikes, holes and hostile text."""

import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from puna.chart import BUCKETS, Curves, Series
from puna.report import CSS, Facts, Report, Samples, Table, write_report

HOSTILE = "<script>alert('1')</script> \"quoted\" & </style></title></p> \x00\x1b[0m\x85\ud800\uffff שלום \u202e 🦙"
SHOWN = HOSTILE.translate({0: "␀", 0x1B: "␛", 0x85: "\ufffd", 0xD800: "\ufffd", 0xFFFF: "\ufffd"})
VOID = {"meta", "link"}


class Page(HTMLParser):
    """Elements in order as (tag, attributes, text inside); fails on a tag closed out of order."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[int] = []
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for index in self.open:
            self.elements[index][2].append(data)

    def texts(self, tag: str, kind: str | None = None) -> list[str]:
        found = (e for e in self.elements if e[0] == tag and (kind is None or e[1].get("class") == kind))
        return ["".join(text) for _, _, text in found]

    def lines(self) -> list[list[list[tuple[float, float]]]]:
        """Of every line its unbroken parts as points; y counts down from 0 to 1000."""
        drawn = [e[1]["d"] or "" for e in self.elements if e[0] == "path" and "vector-effect" in e[1]]
        number = r"(-?[\d.]+) (-?[\d.]+)"
        return [
            [[(float(x), float(y)) for x, y in re.findall(number, part)] for part in path.split("M")[1:]]
            for path in drawn
        ]


@pytest.fixture
def page(tmp_path: Path):
    def write(*sections: Curves | Table | Samples | Facts, title: str = "A run") -> Page:
        write_report(tmp_path / "report.html", Report(title, "one line", sections))
        return Page(tmp_path / "report.html")

    return write


def curves(*points: tuple[float, float | None], **options: bool) -> Curves:
    return Curves("Loss", "step", "nats", [Series("train", points)], **options)


def test_structure(page) -> None:
    """Without doctype, language, viewport, ordered headings and a named picture, phones and screen readers give up."""
    table, samples = Table("Accuracy", ["task", "value"], [["sums", 0.5]]), Samples("Samples", [(1, "a", "b")])
    found = page(curves((1, 2.0), (2, 1.0)), table, samples, Facts("Lineage", {"parents": None, "loss": (1.5, 2)}))
    attributes = [e[1] for e in found.elements]
    assert found.source.startswith("<!doctype html>\n")
    assert attributes[0] == {"lang": "en"}
    assert any(a.get("name") == "viewport" for a in attributes)
    assert [e[0] for e in found.elements if re.fullmatch("h[1-6]", e[0])] == ["h1", "h2", "h2", "h2", "h2"]
    assert all("aria-labelledby" in a for a in attributes if a.get("role") in ("img", "region") and a["class"] != "bar")
    ids = [a["id"] for a in attributes if "id" in a]
    named = " ".join(a["aria-labelledby"] or "" for a in attributes if "aria-labelledby" in a).split()
    assert len(ids) == len(set(ids))
    assert set(named) <= set(ids)


def test_asks_the_network_for_nothing(page) -> None:
    """A report mailed to a colleague told a server who opens it."""
    found = page(curves((1, 2.0)), Facts("f", {"a": "b"}))
    links = [e[1].get(name) for e in found.elements for name in ("href", "src", "action") if name in e[1]]
    policy = [e[1]["content"] for e in found.elements if "http-equiv" in e[1]]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    assert links == ["data:,"]
    assert "://" not in found.source
    assert "url(" not in CSS
    assert "@import" not in CSS


def test_hostile_text(page) -> None:
    """A model that writes `</style><script>` rewrote the page it was shown on; a NUL or a surrogate broke it."""
    series = Series(HOSTILE, [(1, 2.0)], dots=True)
    found = page(
        Curves(HOSTILE, HOSTILE, HOSTILE, [series]),
        Table(HOSTILE, [HOSTILE], [[HOSTILE]], note=HOSTILE),
        Samples(HOSTILE, [(1, HOSTILE, HOSTILE)]),
        Facts(HOSTILE, {HOSTILE: (HOSTILE, None)}),
        title=HOSTILE,
    )
    assert not any(e[0] == "script" for e in found.elements)
    assert found.texts("title")[0] == found.texts("h1")[0] == found.texts("h2")[3] == SHOWN
    assert found.texts("td")[0] == found.texts("b")[0] == SHOWN
    assert found.source.count(SHOWN[-4:]) >= 14


def test_whitespace_of_samples(page) -> None:
    """An indentation a model has learned, shown as one space, looks unlearned."""
    found = page(Samples("s", [(10, "def f():\n", "\treturn  1\n\n")]))
    assert found.texts("p", "text") == ["def f():\n\treturn  1\n\n"]
    assert found.texts("b") == ["def f():\n"]
    assert re.search(r"\.text {[^}]*white-space: pre-wrap", CSS)


def test_thinning_keeps_spikes(page) -> None:
    """The one spike that explains a ruined run fell between two drawn points."""
    values = [random.Random(0).random() for _ in range(30_000)]
    values[12_345], values[23_456] = 50.0, -50.0
    (line,) = page(curves(*enumerate(values))).lines()
    heights = [y for part in line for _, y in part]
    assert BUCKETS <= len(heights) <= 2 * BUCKETS
    assert (min(heights), max(heights)) == pytest.approx((45.5, 954.5), abs=0.1)


@pytest.mark.parametrize("hole", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("size", [30, 30_000])
def test_gap_breaks_the_line(page, hole: float | None, size: int) -> None:
    """A straight line over steps without a loss says all was well there."""
    points = [(i, hole if size // 3 <= i <= size // 2 else 1.0 + i % 3) for i in range(size)]
    found = page(curves(*points))
    assert [len(line) for line in found.lines()] == [2]
    assert f"{size // 2 - size // 3 + 1:,} not drawn" in found.source


def test_lone_point_is_drawn(page) -> None:
    """A point between two gaps has no line: it vanished."""
    found = page(curves((1, 1.0), (2, None), (3, 2.0), (4, None), (5, 1.0)))
    assert len(re.findall(r"\dh0", found.source)) == 3


@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize(
    "points",
    [
        [], [(1, math.nan)], [(1, 3.0)], [(0, 0.0)], [(1, 5.0), (2, 5.0)], [(1, 1e308), (2, -1e308), (math.nan, 1.0)],
        [(1, 5e-324), (2, 0.0)], [(1, -2.0), (2, 3e-7)], [(1, 1e98), (2, 1e-98)], [(1, 1e16), (2, 1e16 + 2)],
        [(5e-91, 1.0), (1e-90, 1.1)],
    ],
)  # fmt: skip
def test_any_number_is_drawn(page, points: list[tuple[float, float]], log_y: bool) -> None:
    """A run that diverged at step 1 had a report that crashed."""
    found = page(curves(*points, log_y=log_y), Curves("none", "x", "y", []), Table("t", [], []), Facts("f", {}))
    for line in found.lines():
        assert all(-0.1 <= number <= 1000.1 for part in line for point in part for number in point)
    assert len(found.source) < 20_000


@pytest.mark.parametrize(
    ("low", "high", "log_y", "ticks"),
    [
        (0, 10, False, ["0", "2", "4", "6", "8", "10"]),
        (2.9, 9.3, False, ["4", "6", "8"]),
        (0.1, 0.3, False, ["0.1", "0.15", "0.2", "0.25", "0.3"]),
        (0, 3e-5, False, ["0", "1e-5", "2e-5", "3e-5"]),
        (-2, 2, False, ["-2", "-1", "0", "1", "2"]),
        (0, 20_000, False, ["0", "5k", "10k", "15k", "20k"]),
        (0, 1_500_000, False, ["0", "500k", "1M", "1.5M"]),
        (3, 11, True, ["4", "6", "8", "10"]),
        (0.4, 5, True, ["0.5", "1", "2", "5"]),
        (1e-6, 1, True, ["1e-6", "1e-5", "0.0001", "0.001", "0.01", "0.1", "1"]),
    ],
)
def test_round_ticks(page, low: float, high: float, log_y: bool, ticks: list[str]) -> None:
    """0.30000000000000004 on an axis; an axis with no label at all between 3 and 11."""
    assert page(curves((1, low), (2, high), log_y=log_y)).texts("text", "end")[:-1] == ticks


def test_series_differ_without_colour(page) -> None:
    """Printed in grey, or to one reader in twelve, six lines were one."""
    found = page(Curves("c", "x", "y", [Series(str(i), [(0, i), (1, i)]) for i in range(12)]))
    colours = [e[1]["class"] for e in found.elements if e[0] == "g"]
    dashes = [e[1]["stroke-dasharray"] for e in found.elements if "vector-effect" in e[1]]
    assert len(set(zip(colours, dashes, strict=True))) == 12


def test_table(page) -> None:
    """Digits that do not stand under digits are not compared; a bar on its own scale lies about its neighbour."""
    rows = [["sums", 1000, (0.0, 0.4, 0.5), 0.5, None], ["spelling", 20, (0.5, 0.75, 1.0), 0.125, math.nan]]
    found = page(Table("t", ["task", "rows", "after", "loss", "cost"], rows, note="Wilson."))
    assert found.texts("td", "number") == ["1,000", "0 to 0.50.40", "0.500", "–", "20", "0.5 to 10.75", "0.125", "nan"]
    bars = [(e[1]["x1"], e[1]["x2"]) for e in found.elements if e[1].get("class") == "from-to"]
    assert bars == [("0.00%", "50.00%"), ("50.00%", "100.00%")]
    assert "Wilson. Bars: one scale, 0 to 1." in found.source


def test_table_of_broken_intervals(page) -> None:
    """One task without an answer took the whole table down."""
    found = page(Table("t", ["a"], [[(math.nan, 0.5, 1.0)], [(math.nan, math.nan, math.nan)]]))
    assert found.texts("td", "number") == ["0.5", "nan"]


def test_facts_side_by_side(page) -> None:
    """A prediction told without its outcome is not a prediction."""
    found = page(Facts("f", {"minutes": (38.5, 41), "machine": "2 cores"}))
    assert found.texts("td") == ["", "38.5", "41", "2 cores"]
    assert found.texts("th") == ["predicted", "measured", "minutes", "machine"]


def test_contrast() -> None:
    """Grey on nearly the same grey: read by designers only. WCAG asks 4.5 to 1."""

    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for theme in re.findall(r":root {(.*?)}", CSS, re.DOTALL):
        colours = dict(re.findall(r"--(\w+): (#\w{6})", theme))
        pairs = [(c, "page") for c in colours if c not in ("page", "rule", "tint")] + [("ink", "tint")]
        for front, back in pairs:
            dark, bright = sorted(light(colours[name]) for name in (front, back))
            assert (bright + 0.05) / (dark + 0.05) >= 4.5, (front, back, theme)
