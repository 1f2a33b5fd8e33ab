from __future__ import annotations

import io
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from rich.console import Console

from rerank_ray.report.charts import linear_scale, log_scale
from rerank_ray.report.page import CurvePoint, PageSystem, render_page
from rerank_ray.report.tables import format_value, markdown_table, print_table

SYSTEMS = {"bm25": {"ndcg@10": 0.5, "queries": 1200}, "run[1]|x": {"ndcg@10": 0.66667, "errors": None}}


def test_markdown_by_hand() -> None:
    assert markdown_table(SYSTEMS) == (
        "| system | ndcg@10 | queries | errors |\n"
        "|---|---:|---:|---:|\n"
        "| bm25 | 0.5000 | 1,200 | – |\n"
        "| run[1]\\|x | **0.6667** | – | – |"
    )


def test_terminal_table_prints_names_as_they_are() -> None:
    output = io.StringIO()
    print_table(SYSTEMS, Console(file=output, width=100), title="cross_encoder:package://m[1]")
    assert "cross_encoder:package://m[1]" in output.getvalue()
    assert "run[1]|x" in output.getvalue()
    assert "0.6667" in output.getvalue()


@pytest.mark.parametrize("width", [20, 60, 80])
def test_no_figure_is_cut_where_the_table_is_too_wide(width: int) -> None:
    """Names and heads go on in the next line; a table that still does not fit is wider than the terminal."""
    metrics = {f"recall@{cut}": cut / 1000 for cut in range(100, 900, 100)}
    systems = {f"{name}, a first stage and a student": {**metrics, "p": "+0.1234"} for name in ("MiniLM", "SmolLM2")}
    output = io.StringIO()
    print_table(systems, Console(file=output, width=width), title="t")
    printed = output.getvalue()
    assert "…" not in printed
    for figure in ("0.1000", "0.8000", "+0.1234"):
        assert printed.count(figure) == 2
    first_column = "".join(line[1:].split("│")[0].strip() for line in printed.splitlines() if line.startswith("│"))
    assert first_column.replace(" ", "") == "".join(systems).replace(" ", "")


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), ("x", "x"), (12345, "12,345"), (0.5, "0.5000"), (1234.5, "1,234")]
)
def test_format_value(value: object, text: str) -> None:
    assert format_value(value) == text


def page(**changes: object) -> str:
    systems = [
        PageSystem(name="BM25", role="first stage", ndcg=0.5),
        PageSystem(name="<b>teacher", role="teacher", ndcg=0.7, pairs_per_second=3.0, parameters=135_000_000),
        PageSystem(name="student", role="student", ndcg=0.66, pairs_per_second=900.0, parameters=22_700_000),
    ]
    curve = [CurvePoint(step=0, loss=2.0, validation_ndcg=0.6), CurvePoint(step=50, loss=1.0, validation_ndcg=0.66)]
    values = {"title": "Results & more", "summary": "s", "systems": systems, "curve": curve, "details": {"a": "b"}}
    return render_page(**{**values, **changes})


class Elements(HTMLParser):
    """Counts elements, and checks that those left open are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_well_formed_and_self_contained() -> None:
    html = page()
    elements = Elements()
    elements.feed(html)
    assert elements.open == []
    assert elements.count["svg"] == elements.count["desc"] == 4
    assert elements.count["tr"] == 4
    assert not {name for name, _ in elements.attributes} & {"src", "href", "onclick"}
    assert "script" not in elements.count
    assert "url(" not in html
    assert "@import" not in html
    assert "<b>" not in html
    assert "Results &amp; more" in html
    assert "22.7 M" in html
    assert "prefers-color-scheme:dark" in html


def test_charts_are_xml_and_stay_inside_their_frame() -> None:
    many = [
        PageSystem(name=f"system {i}", role="r", ndcg=0.6 + i % 3 / 100, pairs_per_second=100.0 + i) for i in range(12)
    ]
    html = page(systems=many)
    for chunk in html.split("<svg")[1:]:
        svg = ElementTree.fromstring("<svg" + chunk.split("</svg>")[0] + "</svg>")
        _, _, width, height = map(float, svg.attrib["viewBox"].split())
        assert svg.attrib["aria-label"]
        for circle in svg.iter("circle"):
            assert 0 <= float(circle.attrib["cx"]) <= width
            assert 0 <= float(circle.attrib["cy"]) <= height


def test_parts_without_data_are_left_out() -> None:
    html = page(systems=[PageSystem(name="only", role="r", ndcg=0.0)], curve=(), details=None)
    assert html.count("<svg") == 1
    assert "Training" not in html
    assert page(curve=[CurvePoint(step=7, validation_ndcg=0.5)]).count("<svg") == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"systems": []}, "at least one system"),
        ({"systems": [PageSystem(name="x", role="r", ndcg=float("nan"))]}, "x: nan can't be drawn"),
        ({"systems": [PageSystem(name="x", role="r", ndcg=0.1, pairs_per_second=0.0)]}, "pairs_per_second"),
        ({"curve": [CurvePoint(step=3, loss=float("inf"))]}, "step 3"),
    ],
)
def test_what_cannot_be_drawn_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        page(**changes)


@pytest.mark.parametrize("losses", [[0.5, 0.5 + 1e-16 * 2], [0.5, 0.5 + 1e-12], [1e-12, 3e-12], [0.0, 0.0]])
def test_curves_that_hardly_move_are_drawn(losses: list[float]) -> None:
    """Two validations may rank alike and differ in the last bit of a mean, at the end of a long job."""
    scale = linear_scale(losses, 100, 0)
    assert all(0 <= scale(loss) <= 100 for loss in losses)
    curve = [CurvePoint(step=step, loss=loss, validation_ndcg=loss) for step, loss in enumerate(losses)]
    render_page(title="t", summary="s", systems=[PageSystem(name="a", role="r", ndcg=0.5)], curve=curve)


def test_scales_by_hand() -> None:
    """0.64 … 0.681 spans 0.041; a quarter is 0.01025, the next step of 1-2-5 is 0.02: ticks 0.64 to 0.70."""
    y = linear_scale([0.64, 0.681], 100, 0)
    assert y.ticks == (0.64, 0.66, 0.68, 0.7)
    assert (y(0.64), y(0.7), y(0.67)) == (100, 0, pytest.approx(50))
    assert log_scale([10, 1000], 0, 1).ticks == (10, 100, 1000)
    assert log_scale([100, 100], 0, 1)(100) == pytest.approx(0.5)
