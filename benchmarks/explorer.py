"""How soon the explorer's picture follows a key press and a drag step, in JupyterLab in a real browser.

Writes reports/bench/explorer.json: for each K, the median and the 95th percentile over 30 moves, from the
event in the browser to the next frame with the new picture; the seconds until the clustering itself is there
once the slider rests; and until a K that was there before is back after K = N was asked for.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import numpy as np
import psutil
from nbformat import v4
from playwright.sync_api import Page, sync_playwright

from kclib._util import files

KS = (64, 1024, 16384, 262144, 1634496)
MOVES = 30
PATIENT = 65536  # the largest K whose clustering is waited for
CELL = "import kclib\nkclib.explore(kclib.load_model(), kclib.load_data())"
# Remembers when the newest event came, and when a frame was next drawn with another picture.
WATCH = """() => {
  let event = 0
  for (const kind of ["keydown", "pointermove", "change"])
    addEventListener(kind, (e) => { event = e.timeStamp }, true)
  const place = document.querySelector(".kclib-picture")
  window.following = () => {
    const before = place.innerHTML
    event = 0
    window.followed = new Promise((resolve, reject) => {
      setTimeout(() => reject("the picture does not follow"), 60000)
      const look = () => event && place.innerHTML !== before
        ? requestAnimationFrame(() => resolve(performance.now() - event))
        : requestAnimationFrame(look)
      look()
    })
  }
}"""


@contextlib.contextmanager
def lab(folder: Path) -> Iterator[str]:
    """Serve a notebook that opens the explorer; yield its address."""
    kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    notebook = v4.new_notebook(cells=[v4.new_code_cell(CELL)], metadata={"kernelspec": kernel})
    nbformat.write(notebook, folder / "explorer.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(8)
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.port={port}",
        f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}",
        f"--LabApp.workspaces_dir={folder / 'workspaces'}", "--LabApp.extension_manager=readonly",
    ]  # fmt: skip
    with (folder / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            while True:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={token}").close()
                    break
                time.sleep(0.3)
            yield f"http://127.0.0.1:{port}/lab/tree/explorer.ipynb?token={token}"
        finally:
            process.terminate()


def opened(page: Page, address: str) -> float:
    """Open the notebook and run it; return the seconds from the run to the first picture."""
    page.goto(address)
    page.locator(".jp-Cell").first.click()
    page.get_by_text("Python 3 (ipykernel) | Idle").first.wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    start = time.perf_counter()
    page.locator(".kclib-picture svg").wait_for()
    page.evaluate(WATCH)
    return time.perf_counter() - start


def settled(page: Page, k: int) -> float:
    """Wait for the clustering of a K; return the seconds it took."""
    start = time.perf_counter()
    page.get_by_text(re.compile(f"^K = {k:,}: ")).wait_for()
    return time.perf_counter() - start


def enter(page: Page, k: int) -> None:
    """Type a K."""
    box = page.get_by_label("K", exact=True)
    box.fill(str(k))
    box.press("Enter")


def by_keys(page: Page) -> list[float]:
    """Return the milliseconds from each of 30 presses of an arrow key to its picture."""
    handle, found = page.locator(".noUi-handle").first, []
    handle.focus()
    for i in range(MOVES):
        page.evaluate("following()")
        page.keyboard.press("ArrowLeft" if i < MOVES / 2 else "ArrowRight")
        found.append(page.evaluate("followed"))
    return found


def by_mouse(page: Page) -> list[float]:
    """Return the milliseconds from each of 30 steps of a drag to its picture."""
    handle, found = page.locator(".noUi-handle").first, []
    track = page.locator(".noUi-base").first.bounding_box()["width"]
    box = handle.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    octave = track / np.log2(max(KS))
    page.mouse.move(x, y)
    page.mouse.down()
    for i in range(MOVES):
        x += octave / 4 * (-1 if i < MOVES / 2 else 1)
        page.evaluate("following()")
        page.mouse.move(x, y)
        found.append(page.evaluate("followed"))
    page.mouse.up()
    return found


def main() -> None:
    rows, about = [], {"cores": os.cpu_count(), "load before": psutil.getloadavg()[0]}
    browser_path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with tempfile.TemporaryDirectory() as folder, lab(Path(folder)) as address, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1366, "height": 768})
        page.set_default_timeout(90_000)
        about["first picture (s)"] = opened(page, address)
        for k in KS:
            enter(page, k)
            page.get_by_text(re.compile(f"K = {k:,}: ")).wait_for()
            row = {"k": k, "moves": MOVES}
            for how, measured in (("key", by_keys(page)), ("drag", by_mouse(page))):
                middle, most = np.percentile(measured, (50, 95)).tolist()
                row |= {f"{how} median (ms)": middle, f"{how} 95 % (ms)": most}
            shown = int(page.get_by_label("K", exact=True).input_value().replace(",", ""))
            row["clustering after (s)"] = settled(page, shown) if shown <= PATIENT else None
            rows.append(row)
            print(row, flush=True)
        enter(page, KS[0])
        settled(page, KS[0])
        enter(page, KS[-1])
        page.wait_for_timeout(2000)
        enter(page, KS[0])
        about["back after K = N (s)"] = settled(page, KS[0])
        browser.close()
    about["load after"] = psutil.getloadavg()[0]
    print(about)
    with files.replacing(Path("reports/bench/explorer.json")) as temporary:
        temporary.write_text(json.dumps(about | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
