import json
import re
import shutil
import sys
import time

import pytest
from playwright.sync_api import expect
from serving import free_port, running

from kclib.experiments import _profiles

TOKEN = "for-tests-only"
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # all cells in the page, also those out of sight
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
HARMLESS = ("favicon",)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab on a copy of notebook 04, at an address."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copy(_profiles.NOTEBOOKS / "04-clustering.ipynb", folder)
    for name, values in SETTINGS.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={TOKEN}",
        f"--ServerApp.root_dir={folder}", f"--LabApp.user_settings_dir={folder / 'settings'}",
        f"--LabApp.workspaces_dir={folder / 'workspaces'}",
    ]  # fmt: skip
    with running(command, f"{address}/api?token={TOKEN}", folder):
        yield f"{address}/lab/tree/04-clustering.ipynb?token={TOKEN}"


@pytest.fixture(scope="module")
def explorer(chromium, lab):
    """Notebook 04 after Run All, and the errors of its page so far; at the end there must be none."""
    page = chromium.new_page(viewport={"width": 1400, "height": 1100})
    page.set_default_timeout(120_000)
    errors = []
    page.on("console", lambda message: message.type == "error" and errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(lab)
    page.locator(".jp-Notebook").wait_for()
    page.get_by_text("Python 3 (ipykernel) | Idle").first.wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.locator(".jp-OutputArea-output").filter(has_text=" a layer removes ").wait_for()  # the last cell's
    page.locator(".kclib-explorer").evaluate("explorer => explorer.scrollIntoView()")
    yield Explorer(page)
    assert [text for text in errors if not any(word in text for word in HARMLESS)] == []
    assert page.get_by_text("Traceback (most recent call last)").count() == 0
    page.close()


class Explorer:
    """The widgets of notebook 04 as a person finds them."""

    def __init__(self, page):
        self.page = page
        self.handle = page.locator(".noUi-handle").first
        self.count = page.get_by_label("K", exact=True)
        self.images = page.get_by_label(re.compile("^test images"))
        self.evaluate = page.get_by_role("button", name="Evaluate accuracy")
        self.cancel = page.get_by_role("button", name="Cancel")

    def picture(self) -> str:
        return self.page.locator(".kclib-picture").inner_html()

    def shows_another_than(self, before: str) -> str:
        end = time.monotonic() + 60
        while (now := self.picture()) == before:
            assert time.monotonic() < end, "the picture does not change"
            self.page.wait_for_timeout(50)
        return now

    def settles(self) -> None:
        """Wait until what is shown is the clustering of the K that the controls say, and no sketch."""
        self.page.get_by_text(re.compile(f"^K = {self.k():,}: ")).wait_for()

    def k(self) -> int:
        return int(self.count.input_value().replace(",", ""))

    def enter(self, text: str) -> None:
        self.count.fill(text)
        self.count.press("Enter")


def test_the_slider_moves_by_keyboard_and_the_picture_follows(explorer):
    before, k = explorer.picture(), explorer.k()
    explorer.handle.focus()
    explorer.page.keyboard.press("ArrowRight")
    explorer.shows_another_than(before)
    assert explorer.k() == round(k * 2 ** (1 / 8))


def test_the_picture_follows_while_the_mouse_drags_the_slider(explorer):
    box = explorer.handle.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    explorer.page.mouse.move(x, y)
    explorer.page.mouse.down()
    ks, pictures = [explorer.k()], [explorer.picture()]
    for _ in range(4):
        x -= 25
        explorer.page.mouse.move(x, y)
        pictures.append(explorer.shows_another_than(pictures[-1]))
        ks.append(explorer.k())
        expect(explorer.page.get_by_text(f"K = {ks[-1]:,}: ")).to_be_visible()
    explorer.page.mouse.up()
    assert sorted(ks, reverse=True) == ks
    assert len(set(ks)) == len(set(pictures)) == 5
    explorer.settles()
    assert explorer.k() == ks[-1]


def test_a_typed_k_is_shown_and_moves_the_slider(explorer):
    before, place = explorer.picture(), explorer.handle.bounding_box()["x"]
    explorer.enter("1k")
    explorer.shows_another_than(before)
    expect(explorer.page.locator(".kclib-facts")).to_contain_text("representatives 1,000")
    assert explorer.count.input_value() == "1,000"
    assert explorer.handle.bounding_box()["x"] != place
    explorer.settles()
    assert explorer.k() == 1000, "the slider, which has no step there, asks for nothing of its own"


@pytest.mark.parametrize(
    ("text", "says"),
    [("1e9", "K is 1 to 1,634,496."), ("3.7", "3.7 is no whole number: K is 1 to 1,634,496.")],
)
def test_an_odd_entry_is_told_beside_the_field_and_changes_nothing(explorer, text, says):
    before = explorer.picture()
    explorer.enter(text)
    beside = explorer.page.get_by_text(says, exact=True)
    expect(beside).to_be_visible()
    (field, sentence) = (x.bounding_box() for x in (explorer.count, beside))
    assert abs(field["y"] + field["height"] / 2 - sentence["y"] - sentence["height"] / 2) < field["height"]
    assert explorer.count.input_value() == text
    assert explorer.picture() == before
    explorer.enter("1000")
    expect(beside).to_have_count(0)


def test_a_k_that_was_there_before_is_back_at_once_though_every_kernel_was_asked_for(explorer):
    explorer.enter("1000")
    explorer.settles()
    before = explorer.picture()
    explorer.enter("1634496")
    explorer.shows_another_than(before)
    explorer.enter("1000")
    explorer.settles()
    assert explorer.picture() == before
    explorer.page.wait_for_timeout(2000)
    assert explorer.picture() == before, "what was asked for meanwhile does not come after all"


@pytest.mark.parametrize(("width", "height"), [(1366, 768), (1920, 1080)])
def test_controls_codebook_and_accuracy_are_in_view_side_by_side(explorer, width, height):
    page = explorer.page
    old = page.viewport_size
    page.set_viewport_size({"width": width, "height": height})
    page.locator(".kclib-explorer").evaluate("explorer => explorer.scrollIntoView()")
    boxes = [
        page.locator(name).first.bounding_box()
        for name in (
            ".noUi-handle",
            ".kclib-picture svg",
            ".kclib-accuracy svg",
            "button:has-text('Evaluate')",
        )
    ]
    page.set_viewport_size(old)
    for box in boxes:
        assert box["y"] >= 0
        assert box["y"] + box["height"] <= height - 24, "above Lab's status bar"
        assert box["x"] + box["width"] <= width
    assert boxes[1]["x"] + boxes[1]["width"] <= boxes[2]["x"], "two columns"


def test_every_control_has_a_name_and_every_picture_its_words(explorer):
    view = explorer.page.locator(".kclib-explorer")
    for role in ("textbox", "combobox", "listbox", "button", "tab"):
        found = view.get_by_role(role)
        assert found.count() > 0
        assert view.get_by_role(role, name=re.compile("[a-z]", re.IGNORECASE)).count() == found.count(), role
    for picture in view.locator("svg").all():
        assert len(picture.get_attribute("aria-label")) > 20
    assert view.locator("[title=null]").count() == 0


def test_tabs_are_reached_by_keyboard_and_show_what_they_say(explorer):
    page = explorer.page
    for name, says in (("Layers", "Squared weight"), ("Members", "stands for"), ("Filter", "loses")):
        page.get_by_role("tab", name=name).focus()
        page.keyboard.press("Enter")
        expect(page.get_by_text(re.compile(says)).last).to_be_visible()
    page.get_by_role("tab", name="Accuracy").click()


def test_accuracy_can_be_cancelled_and_nothing_of_it_is_kept(explorer):
    explorer.images.fill("10000")
    explorer.images.press("Enter")
    explorer.evaluate.click()
    explorer.page.get_by_text(re.compile(r"on 10,000 images: \d+%, about .* left")).wait_for()
    expect(explorer.evaluate).to_be_disabled()
    explorer.cancel.click()
    explorer.page.get_by_text(re.compile("^cancelled")).wait_for()
    expect(explorer.evaluate).to_be_enabled()
    assert explorer.page.get_by_text("dense model").count() == 0


def test_accuracy_joins_the_table_and_goes_stale_when_the_slider_moves_on(explorer):
    explorer.images.fill("200")
    explorer.images.press("Enter")
    explorer.evaluate.click()
    explorer.page.get_by_text(re.compile(r"top-1 of what is shown: \d+\.\d+ %$")).wait_for()
    row = explorer.page.get_by_role("row").filter(has_text="dense model")
    expect(row).to_contain_text("200")
    expect(explorer.page.locator(".kclib-accuracy")).to_contain_text("measured: K = 1,000")
    before = explorer.picture()
    explorer.handle.focus()
    explorer.page.keyboard.press("ArrowLeft")
    explorer.shows_another_than(before)
    explorer.page.get_by_text(re.compile("stale: .* top-1 is that of K = 1,000")).wait_for()


def test_the_dashboard_serves_the_explorer_alone(chromium, tmp_path):
    shutil.copy(_profiles.NOTEBOOKS / "04-clustering.ipynb", tmp_path)
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [
        sys.executable, "-m", "voila", "04-clustering.ipynb", "--no-browser", "--Voila.ip=127.0.0.1",
        f"--Voila.config_file_paths={_profiles.NOTEBOOKS / 'dashboard'}", f"--port={port}",
        "--port_retries=0",
    ]  # fmt: skip
    page = chromium.new_page(viewport={"width": 1400, "height": 1100})
    page.set_default_timeout(120_000)
    with running(command, f"{address}/ready?", tmp_path):
        page.goto(address)
        page.locator(".kclib-picture svg").wait_for()
        served = Explorer(page)
        before, k = served.picture(), served.k()
        served.handle.focus()
        page.keyboard.press("ArrowRight")
        served.shows_another_than(before)
        assert served.k() > k
        assert page.get_by_role("heading").all_inner_texts() == ["Try it"]
        assert page.get_by_text("cluster_explorer").count() == 0  # no code
    page.close()
