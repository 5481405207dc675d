"""What a reader can do with a report's pages: sort tables, unfold code."""

import pandas as pd
import pytest
from nbformat import v4

from kclib.experiments import _reports

TABLE = pd.DataFrame(
    {
        "layer": ["conv10", "conv2", "conv1"],
        "K": ["4,096", "–", "16"],
        "drop (points)": ["-0.55 [-1.04, -0.06]", "83.55 [81.79, 85.31]", "5.10 [3.87, 6.33]"],
        "p": ["0.043", "< 0.001", "1.000"],
    }
)
ASCENDING = {
    "layer": ["conv1", "conv2", "conv10"],
    "K": ["16", "4,096", "–"],
    "drop (points)": ["-0.55 [-1.04, -0.06]", "5.10 [3.87, 6.33]", "83.55 [81.79, 85.31]"],
    "p": ["< 0.001", "0.043", "1.000"],
}


@pytest.fixture(scope="module", params=["plain", "styled"])
def page(request, chromium, tmp_path_factory):
    """A page with one table, as pandas shows it."""
    html = TABLE.to_html(index=False) if request.param == "plain" else TABLE.style.hide().to_html()
    output = v4.new_output("display_data", {"text/html": html, "text/plain": "a table"})
    notebook = v4.new_notebook(cells=[v4.new_code_cell("show(table)", outputs=[output])])
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(_reports.to_html(notebook, title="page"), encoding="utf-8")
    opened = chromium.new_page()
    opened.goto(path.as_uri())
    yield opened
    opened.close()


@pytest.mark.parametrize("column", TABLE.columns)
def test_a_click_sorts_by_a_column_and_another_the_other_way_round(page, column):
    place = TABLE.columns.get_loc(column)
    head = page.locator("thead th").nth(place)
    cells = page.locator(f"tbody tr td:nth-child({place + 1})")
    head.click()
    assert cells.all_inner_texts() == ASCENDING[column]
    assert head.get_attribute("aria-sort") == "ascending"
    head.press("Enter")
    assert cells.all_inner_texts() == ASCENDING[column][::-1]
    assert page.locator("th[aria-sort=descending]").count() == 1


def test_code_is_folded_until_it_is_asked_for(page):
    code = page.get_by_text("show(table)")
    assert not code.is_visible()
    page.get_by_text("code", exact=True).click()
    assert code.is_visible()
