"""What the README promises, and its data's and its CI's page."""

import re
from pathlib import Path

import yaml

from benchmarks import tables
from kclib.datasets import _named_sets
from kclib.experiments import _profiles
from kclib.models import _loading

ROOT = Path(__file__).parents[1]


def test_it_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_its_example_runs_as_printed(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(example.splitlines()) == 8
    exec(compile(example, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert re.search(r"^-?\d\.\d\d \[-?\d\.\d\d, \d\.\d\d\]$", printed, re.MULTILINE)
    assert "entropy_fp16" in printed
    assert (tmp_path / "small.safetensors").stat().st_size < 6e6  # of 59 MB


def test_every_make_target_it_names_exists():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for page in tables.pages():
        assert set(re.findall(r"(?:`|^    )make (\w+)", page.read_text(), re.MULTILINE)) <= set(targets)


def test_the_tables_rows_are_written_anew():
    text = "a\n<!-- rows: slider -->\n| K | x | y |\n|---|---|---|\n| 1 | 2 | 3 |\n\n| kept |\n"
    written = tables.rewritten(text).splitlines()
    assert written[:4] == text.splitlines()[:4]
    assert written[-2:] == ["", "| kept |"]
    assert [line.split(" | ")[0] for line in written[4:-2]] == ["| 16,384", "| 1,634,496"]


def test_the_checksums_of_the_data_are_those_the_code_checks():
    listed = dict(
        re.findall(
            r"^\| `([^`]+)` \| `([0-9a-f]{64})` \|$", (ROOT / "data/README.md").read_text(), re.MULTILINE
        )
    )
    expected = {f"FashionMNIST/raw/{name}": digest for name, digest in _named_sets.FASHION_FILES.items()}
    assert listed == expected | {_loading.FASHION_FILE: _loading.FASHION_SHA256}


def test_the_workflow_is_yaml_whose_commands_exist():
    text = (ROOT / "docs" / "ci.md").read_text()
    workflow = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    steps = workflow["jobs"]["report"]["steps"]
    commands = [step["run"] for step in steps if "run" in step]
    assert commands == [
        "make setup",
        '.venv/bin/kclib sweep "$PROFILE" --jobs 2',
        '.venv/bin/kclib batch --profile "$PROFILE" --no-open',
    ]
    assert workflow["jobs"]["report"]["env"]["PROFILE"] in _profiles.names()
    uploaded = next(step for step in steps if "upload-artifact" in step.get("uses", ""))
    assert uploaded["with"]["path"] == "reports/"
    assert uploaded["if"] == "always()"  # also of a run that failed
