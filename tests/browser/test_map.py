import base64
import contextlib
import io

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import TimeoutError, expect
from torch import nn

from kclib.explorers import interactive_map
from kclib.kernels import extract

PLACE = """([x, y]) => {
  const plot = [...Bokeh.documents[0]._all_models.values()].find((model) => model.type == "Figure")
  const view = Bokeh.index.find_one_by_id(plot.id), box = view.el.getBoundingClientRect()
  return [box.left + view.frame.x_scale.compute(x), box.top + view.frame.y_scale.compute(y)]
}"""


BARS = """() => [...Bokeh.documents[0]._all_models.values()]
  .filter((model) => model.type == "ColorBar" && model.visible).map((bar) => bar.title)"""


SELECTED = """() => [...Bokeh.documents[0]._all_models.values()]
  .filter((model) => model.type == "Selection").map((model) => model.indices.join()).join(";")"""


@pytest.fixture(scope="module")
def kernels():
    """The kernels of two layers, the first on the left of the map, the second on its right, and clusters."""
    torch.manual_seed(0)
    bank = extract(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 32, 3)))
    n_left = bank.layers[0].n_kernels
    left = [(-4 + i % 4, i // 4) for i in range(n_left)]
    right = [(1 + i % 16, i // 16) for i in range(len(bank) - n_left)]
    clusters = {"even or odd": np.arange(len(bank)) % 2, "all one": np.zeros(len(bank), int)}
    return bank, np.array(left + right, np.float32), clusters


@pytest.fixture
def report(chromium, kernels, tmp_path):
    """A static page with the map of `kernels`, which may ask for nothing and must make no errors."""
    bank, layout, clusters = kernels
    document = interactive_map.interactive(
        layout, bank, np.arange(len(bank)), clusters=clusters, title="Kernels"
    )
    file = tmp_path / "report.html"
    frame = interactive_map.embedded(document, title="map").data
    file.write_text(f"<!doctype html><meta charset=utf-8><p>Before</p>{frame}", encoding="utf-8")
    page = chromium.new_page(viewport={"width": 1200, "height": 800})
    faults = []

    def refuse(route):
        if route.request.url == file.as_uri():
            route.continue_()
        else:
            faults.append(route.request.url)
            route.abort()

    page.route("**/*", refuse)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda entry: faults.append(entry.text) if entry.type == "error" else None)
    page.goto(file.as_uri())
    page.frames[1].wait_for_function("window.Bokeh?.documents[0]?.is_idle")
    yield Report(page)
    page.close()
    assert not faults


class Report:
    def __init__(self, page):
        self.page, self.frame = page, page.frames[1]

    def place(self, x, y):
        """Return where a place of the map is on the page."""
        corner = self.page.locator("iframe").bounding_box()
        x, y = self.frame.evaluate(PLACE, [float(x), float(y)])
        return corner["x"] + x, corner["y"] + y

    def hover(self, x, y):
        self.page.mouse.move(*self.place(x + 0.02, y))
        self.page.mouse.move(*self.place(x, y))

    def lasso(self, *corners):
        """Draw around kernels; anew where the page was so slow that it took it for a long press."""
        first, *others = [self.place(*corner) for corner in corners]
        before = self.frame.evaluate(SELECTED)
        for _ in range(5):
            self.page.mouse.move(*first)
            self.page.mouse.down()
            for place in others:
                self.page.mouse.move(*place, steps=4)
            self.page.mouse.up()
            with contextlib.suppress(TimeoutError):
                self.frame.wait_for_function(f"before => ({SELECTED})() != before", arg=before, timeout=5_000)
                return
        pytest.fail("the lasso selects nothing")

    def colour(self, x, y):
        """Return the colour of a place of the map, 0 to 255."""
        picture = Image.open(io.BytesIO(self.page.screenshot())).convert("RGB")
        return np.array(picture.getpixel(tuple(round(at) for at in self.place(x, y))))

    def rows(self):
        """Return the texts of the table's first rows."""
        self.frame.locator(".slick-row").first.wait_for()
        return [row.inner_text().split() for row in self.frame.locator(".slick-row").all()]


def pixels(image):
    png = image.get_attribute("src").removeprefix("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"))


def drawn(kernel):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(interactive_map._pictures(kernel[None])[0]))))


def expected_rows(bank, indices, labels):
    origin = bank.origin(indices)
    return [
        [layer, str(out), str(channel), str(label)]
        for layer, out, channel, label in zip(
            origin["layer"], origin["out"], origin["in"], labels[indices], strict=True
        )
    ]


LEFT = [(-4.5, -0.5), (-0.2, -0.5), (-0.2, 6), (-4.5, 6)]
ALL = [(-4.6, -0.6), (16.6, -0.6), (16.6, 16.4), (-4.6, 16.4)]


def test_hovering_shows_the_kernel_and_what_is_known_of_it(report, kernels):
    bank, layout, _ = kernels
    report.hover(*layout[31])
    norm = np.linalg.norm(bank.kernels[31])
    texts = report.frame.get_by_text("channel 7")
    assert texts.inner_text().split("\n") == [
        "1", "filter 0, channel 7", f"norm {norm:.3g}", "even or odd: cluster 1", "all one: cluster 0",
    ]  # fmt: skip
    picture = report.frame.locator("img[width='72']")
    np.testing.assert_array_equal(pixels(picture), drawn(bank.kernels[31]))


def test_lasso_lists_the_kernels_and_shows_their_mean(report, kernels):
    bank, _, clusters = kernels
    report.lasso(*LEFT)
    expect(report.frame.get_by_text("24 kernels selected, 24 shown")).to_be_visible()
    mean = bank.kernels[:24].mean(0, dtype=float)
    cosines = bank.points[:24] @ mean.ravel() / np.linalg.norm(bank.points[:24], axis=1)
    expect(report.frame.get_by_text(f"norm {np.linalg.norm(mean):.3g} (weight units)")).to_be_visible()
    alike = (cosines / np.linalg.norm(mean)).mean()
    expect(report.frame.get_by_text(f"Mean cosine to it: {alike:.2f}")).to_be_visible()
    np.testing.assert_array_equal(pixels(report.frame.locator("img[width='96']")), drawn(mean))

    rows = report.rows()
    assert len(rows) >= 10
    expected = expected_rows(bank, np.arange(len(rows)), clusters["even or odd"])
    assert [[*row[:3], row[4]] for row in rows] == expected
    np.testing.assert_allclose(
        [float(row[3]) for row in rows], np.linalg.norm(bank.points[: len(rows)], axis=1), atol=6e-4
    )
    pictures = report.frame.locator(".slick-row img").all()
    for picture, kernel in zip(pictures, bank.kernels[: len(rows)], strict=True):
        np.testing.assert_array_equal(pixels(picture), drawn(kernel))


def test_of_many_kernels_the_first_two_hundred_are_listed_and_none_after_a_reset(report):
    expect(report.frame.get_by_text("Draw a lasso around points")).to_be_visible()
    report.lasso(*ALL)
    expect(report.frame.get_by_text("280 kernels selected, 200 shown")).to_be_visible()
    report.page.mouse.click(*report.place(-2, 14))
    expect(report.frame.get_by_text("Draw a lasso around points")).to_be_visible()
    expect(report.frame.locator(".slick-row")).to_have_count(0)


def test_another_selection_of_as_many_kernels_is_listed_anew(report, kernels):
    bank, layout, _ = kernels
    for i in (5, 30):
        report.page.wait_for_timeout(500)  # or two clicks were a double one
        report.page.mouse.click(*report.place(*layout[i]))
        expect(report.frame.get_by_text("1 kernel selected, 1 shown")).to_be_visible()
        origin = bank.origin(np.array([i])).iloc[0]
        cells = report.frame.locator(".slick-cell")
        expect(cells.nth(1)).to_have_text(origin["layer"])
        expect(cells.nth(2)).to_have_text(str(origin["out"]))
        expect(cells.nth(3)).to_have_text(str(origin["in"]))


def test_choice_of_colour_changes_points_bars_and_the_tables_clusters(report, kernels):
    _, layout, _ = kernels
    select = report.frame.get_by_label("Colour by")
    before = [report.colour(*layout[i]) for i in (0, 1)]
    np.testing.assert_allclose(before[0], before[1], atol=3)  # of one layer
    assert report.frame.evaluate(BARS) == ["layer"]
    select.select_option(label="norm")
    expect(report.frame.get_by_text("On a log scale")).to_be_visible()
    assert report.frame.evaluate(BARS) == ["kernel norm (weight units)"]
    select.select_option(label="even or odd")
    expect(report.frame.get_by_text("Each cluster has a colour")).to_be_visible()
    assert report.frame.evaluate(BARS) == []
    after = [report.colour(*layout[i]) for i in (0, 1, 2)]
    np.testing.assert_allclose(after[0], after[2], atol=3)
    assert np.abs(after[0] - after[1]).max() > 50

    report.lasso(*LEFT)
    assert [row[4] for row in report.rows()[:4]] == ["0", "1", "0", "1"]
    selected = [report.colour(*layout[i]) for i in (0, 1)]
    others = [report.colour(*layout[i]) for i in (100, 101)]  # faint, yet of their clusters' colours
    assert 5 < np.abs(others[0] - others[1]).max() < 50
    select.select_option(label="all one")
    expect(report.frame.get_by_text("Clusters below: all one")).to_be_visible()
    expect(report.frame.locator(".slick-row").nth(1).locator(".slick-cell").last).to_have_text("0")
    assert {row[4] for row in report.rows()} == {"0"}
    expect(report.frame.get_by_text("24 kernels selected")).to_be_visible()
    np.testing.assert_allclose(report.colour(*layout[1]), selected[0], atol=3)
    assert np.abs(selected[0] - selected[1]).max() > 50


def test_map_is_as_high_as_wide_for_equal_distances(report):
    (x0, y0), (x1, y1) = report.place(0, 0), report.place(5, 5)
    assert x1 - x0 == pytest.approx(y0 - y1, rel=0.02)
