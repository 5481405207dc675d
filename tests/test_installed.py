"""The package as it is installed: away from the repository, with its own files alone."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from sentences import is_one_sentence

import kclib

ROOT = Path(kclib.__file__).parents[1]
NETWORK = """
import torch
from torch import nn

def factory():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
"""
LIBRARY = """
import kclib, mymod, torch

network = mymod.factory()
pictures = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8)
images = kclib.ImageSet("noise", pictures, torch.arange(12) % 4, tuple("abcd"), fingerprint="1")
clusters = kclib.cluster(kclib.extract(network), 5)
small = kclib.compress(network, clusters)
kclib.save(small, "library.safetensors")
again = kclib.load("library.safetensors", architecture=network)
before, after = (kclib.evaluate(x, images, progress=False) for x in (small, again))
assert (before.predictions == after.predictions).all()
print(clusters.n_clusters, kclib.__file__)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the files of the package that an installation has, the compiled ones included."""
    folder = tmp_path_factory.mktemp("site")
    packed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for path in ROOT.glob("kclib/**/*"):
        package = ".".join(path.parent.relative_to(ROOT).parts)
        kept = path.suffix == ".py" or "__pycache__" in path.parts
        if path.is_file() and (kept or any(path.match(x) for x in packed.get(package, ()))):
            target = folder / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
    return folder


@pytest.fixture
def away(site, tmp_path):
    """Run Python with that package, in a folder of one's own."""
    (tmp_path / "mymod.py").write_text(NETWORK)
    others = {k: v for k, v in os.environ.items() if not k.startswith("KCLIB_")}
    variables = others | {"PYTHONPATH": str(site), "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def run(*arguments):
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip

    return run


def test_all_files_of_the_package_are_installed(site):
    here = {x.relative_to(ROOT) for x in ROOT.glob("kclib/**/*") if x.is_file()}
    assert here == {x.relative_to(site) for x in site.glob("kclib/**/*") if x.is_file()}


def test_ones_own_network_is_clustered_and_compressed(away, site, tmp_path):
    done = away("-c", LIBRARY)
    assert (done.returncode, done.stdout) == (0, f"10 {site / 'kclib' / '__init__.py'}\n"), done.stderr
    done = away("-m", "kclib", "compress", "mymod:factory", "--clusters", "5", "-o", "small.safetensors")
    assert done.returncode == 0, done.stderr
    assert "--data DATA --model mymod:factory" in done.stdout
    assert (tmp_path / "small.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["compress", "vgg16-fashion", "--clusters", "5", "-o", "x"],
            "set KCLIB_DATA to the repository's folder data",
        ),
        (["sweep", "smoke"], "run in a checkout of it, or give the path of a YAML file"),
    ],
)
def test_what_the_repository_alone_has_is_said_in_one_sentence(away, tmp_path, arguments, message):
    done = away("-m", "kclib", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert is_one_sentence(done.stderr)
    assert message in done.stderr


def test_results_are_kept_in_the_users_own_cache(away, tmp_path):
    done = away("-m", "kclib", "results")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(str(tmp_path / "cache" / "kclib"))
