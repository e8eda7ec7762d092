"""One table for all results: the same cells in the text and in the HTML, aligned alike."""

import re

import pytest
from funcgrad.transforms.core.report import Report, Table

from funcgrad.notebooks import html

ROWS = [("1", "a", "x"), ("1,000", "", "yy")]


def test_columns_are_as_wide_as_their_widest_cell():
    assert str(Report((Table(ROWS, ("bytes", "name", "line"), "><"),))).splitlines() == [
        "bytes  name  line",
        "    1  a     x",
        "1,000        yy",
    ]


@pytest.mark.parametrize(
    ("table", "lines"),
    [
        (Table(ROWS), ["  1      a  x", "  1,000     yy"]),
        (Table(ROWS, title="values"), ["values", "  1      a  x", "  1,000     yy"]),
        (Table(ROWS[:1], ("n", "", ""), title="values"), ["values", "  n", "  1  a  x"]),
        (Table(ROWS, ("n", "", ""), limit=1), ["n", "1  a  x", "… 1 more"]),
        (Table(ROWS, limit=1), ["  1  a  x", "  … 1 more"]),
        (Table(ROWS, limit=2), ["  1      a  x", "  1,000     yy"]),
        (Table([]), []),
        (Table([], ("n", "name")), ["n  name"]),
    ],
)
def test_the_text_of_a_table(table, lines):
    assert str(Report(("head", table, "end"))).splitlines() == ["head", *lines, "end"]


def test_html_has_the_cells_of_the_text():
    table = Table([*ROWS, ("<b>", "&", "")], ("bytes", "name", "line"), ">", "values", limit=3)
    page = html(Report(("1 < 2", table)))
    assert page.startswith("<div>1 &lt; 2</div><table>")
    assert re.findall(r"<caption[^>]*>(.*?)</caption>", page) == ["values"]
    rows = [re.findall(r'<(t[hd]) style="text-align:(\w+)">(.*?)</t', row) for row in page.split("<tr>")[1:]]
    sides = ("right", "left", "left")
    assert rows[0] == [("th", side, cell) for side, cell in zip(sides, table.header, strict=True)]
    escaped = [*ROWS, ("&lt;b&gt;", "&amp;", "")]
    assert rows[1:] == [[("td", *pair) for pair in zip(sides, row, strict=True)] for row in escaped]


def test_html_says_how_many_rows_it_leaves_out():
    page = html(Report((Table(ROWS, limit=1),)))
    assert page.count("<tr>") == 1
    assert page.endswith("<div>… 1 more</div>")
