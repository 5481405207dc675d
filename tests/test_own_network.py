"""The page "Your own network": its examples run as printed, on five kinds of network that are not ours."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PAGE = Path(__file__).parents[1] / "docs" / "own-network.md"


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder in which the page's code can run: photos of its four classes, named as people name them."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    for name in ("Ant", "bee", "Dog"):
        (tmp_path / "photos" / "val" / name).mkdir(parents=True)
        (tmp_path / "photos" / "train" / name).mkdir(parents=True)
        for i in range(4):
            for split in ("train", "val"):
                pixels = draw.integers(0, 256, (70, 80, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "photos" / split / name / f"{i}.jpg")
    return tmp_path


def test_its_examples_run_as_printed(photos, capsys, one_thread):
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
    names = {}
    for section in sections:
        code = "\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL))
        exec(compile(code, PAGE.name, "exec"), names)
    assert len(sections) == 8
    printed = capsys.readouterr().out
    top1 = float(re.search(r"top-1 (\d+\.\d+) \[.*\] %, then (\d+\.\d+)", printed)[1])
    assert top1 > 60
    assert len(re.findall(r"drop|-?\d+\.\d\d \[", printed)) >= 6
    assert {p.name for p in photos.glob("*.safetensors")} == {
        "lenet.safetensors",
        "vision.safetensors",
        "segmenter.safetensors",
    }


def test_every_link_in_it_leads_to_a_section():
    text = PAGE.read_text()
    titles = re.findall(r"^## (.+)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    linked = set(re.findall(r"\]\(#([^)]+)\)", text))
    assert len(linked) == 5
    assert linked <= anchors
