"""What a reader can do with a report's pages: sort tables, show code, read them in the dark and on paper."""

import re

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
    cells = [v4.new_code_cell("show(table)", outputs=[output]), v4.new_code_cell("show(picture)")]
    folder = tmp_path_factory.mktemp("page")
    _reports.render(v4.new_notebook(cells=cells), folder, _reports.Chapter("page", "done"))
    opened = chromium.new_page()
    opened.goto((folder / "page.html").as_uri())
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


def test_one_switch_shows_all_code(page):
    switch = page.get_by_label("show the code")
    for shown in (False, True, False):
        switch.set_checked(shown)
        for code in ("show(table)", "show(picture)"):
            assert page.get_by_text(code).is_visible() == shown


def test_a_dark_screen_gets_light_text_on_a_dark_ground_and_paper_does_not(page):
    grounds = {}
    for scheme, media in (("light", "screen"), ("dark", "screen"), ("dark", "print")):
        page.emulate_media(color_scheme=scheme, media=media)
        style = page.evaluate(
            "(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))"
        )
        text, ground = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in style)
        grounds[scheme, media] = text < ground
    page.emulate_media(color_scheme="light", media="screen")
    assert grounds == {("light", "screen"): True, ("dark", "screen"): False, ("dark", "print"): True}


@pytest.mark.parametrize("media", ["screen", "print"])
def test_the_second_column_is_on_an_800_pixel_page(page, media):
    page.set_viewport_size({"width": 800, "height": 600})
    page.emulate_media(media=media)
    box = page.locator("thead th").nth(1).bounding_box()
    assert box["x"] + box["width"] < 800
    assert page.evaluate("document.documentElement.scrollWidth") <= 800, "only the table scrolls"
    page.emulate_media(media="screen")
