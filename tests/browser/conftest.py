import os
import shutil

import pytest
from playwright.sync_api import sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
QUIET = ("quic", "background-networking", "component-update", "sync", "gpu")


@pytest.fixture(scope="module")
def chromium():
    """The system's Chromium. Not for the session: while it is open, no other test can run an event loop."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        missing = pytest.fail if "CI" in os.environ else pytest.skip
        missing(f"no browser found; install one of {', '.join(NAMES)}.")
    with sync_playwright() as playwright:
        options = ["--no-sandbox", *(f"--disable-{what}" for what in QUIET)]
        browser = playwright.chromium.launch(executable_path=found, args=options)
        yield browser
        browser.close()
