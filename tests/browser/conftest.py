import contextlib
import os
import shutil
import threading

import psutil
import pytest
from playwright.sync_api import Error, expect, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
expect.set_options(timeout=60_000)  # where other processes run, a page is slow
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
        watchdog = threading.Timer(60, _kill)
        watchdog.start()
        with contextlib.suppress(Error):
            browser.close()
    watchdog.cancel()


def _kill():
    """End the browser and its driver, which may never answer that they have closed."""
    for process in psutil.Process().children(recursive=True):
        if any(name in process.name() for name in ("node", "chrom")):
            process.kill()
