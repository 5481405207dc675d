"""What the README promises: its example runs, and its tables agree with the code."""

import json
import re
from pathlib import Path

import pandas as pd
import yaml

from kclib import datasets, models, profiles

ROOT = Path(__file__).parents[1]


def test_the_examples_run_as_printed(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(compile("\n".join(examples), "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert re.search(r"top-1 \(%\): 9\d\.\d\d \[.*\] -> \d\d\.\d\d", printed)
    assert "entropy_fp16" in printed
    assert re.search(r"\{256: \d+\.\d+, 1024: .*, 4096: .*\} \d+\.\d+", printed)


def test_every_notebook_and_make_target_it_names_exists():
    text = (ROOT / "README.md").read_text()
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (ROOT / link).exists(), link
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"make (\w+)", text)) <= set(targets)


def test_its_table_is_that_of_the_run_beside_its_picture():
    run = pd.read_csv(ROOT / "docs" / "accuracy.csv")
    names = {"dense": "dense", "layer": "a layer", "global": "for all"}
    rows = [
        f"| {names[r.scope]} | {f'{r.k:,}' if r.k else '–'} | {r.top1:.2f} "
        f"| {r['drop']:.2f} [{r.drop_low:.2f}, {r.drop_high:.2f}] "
        f"| {r.kernels_removed:.2f} | {r.bytes_removed:.2f} |"
        for _, r in run.iterrows()
    ]
    text = (ROOT / "README.md").read_text()
    printed = re.findall(r"^\| (?:dense|a layer|for all) \|.*$", text, re.MULTILINE)
    assert printed
    assert set(printed) <= set(rows)
    assert (ROOT / "docs" / "accuracy.png").stat().st_size > 10_000


def test_its_speeds_are_those_of_the_benchmark():
    rows = []
    for name, weights in (("shipped", "vgg16-fashion"), ("ImageNet", "vgg16_imagenet_features")):
        run = json.loads((ROOT / "docs" / f"kmeans-{weights}.json").read_text())
        rows += [
            f"| {name} | {r['K']:,} | {r['peer']} | {r['ours (s)']:.1f} | {r['peer (s)']:.1f} "
            f"| {r['time ratio']:.3f} | {r['inertia ratio']:.3f} |"
            for r in run["peers"]
        ]
    text = (ROOT / "README.md").read_text()
    assert re.findall(r"^\| (?:shipped|ImageNet) \|.*$", text, re.MULTILINE) == rows


OWN = {
    "dense": "as shipped, dense",
    "clustering, corrected": "corrected, not trained",
    "clustering, trained": "corrected and trained",
    "dense, trained as long": "dense, trained as long",
}
OTHER_NETWORKS = {
    "resnet18-fashion": "ResNet-18",
    "vgg16-imagenet-probe": "ImageNet's VGG-16 and a linear probe",
}


def _points(row: dict) -> str:
    return f"{row['drop']:.2f} [{row['drop_low']:.2f}, {row['drop_high']:.2f}]"


def _measured(row: dict) -> str:
    return f"| {row['bytes'] / 1e6:.2f} | {row['ratio']:.1f} | {row['top1']:.2f} | {_points(row)} |"


def _lose_less() -> str:
    text = (ROOT / "README.md").read_text()
    return text[text.index("## Lose less") :].split("\n## ")[0]


def test_its_drops_are_those_of_the_benchmark():
    rows = [r for r in json.loads((ROOT / "docs" / "recovery.json").read_text())["rows"] if "top1" in r]
    mine = [r for r in rows if r["network"] == "vgg16-fashion"]
    own = [f"| {OWN[r['method']]} {_measured(r)}" for r in mine if r["method"] in OWN]
    section = _lose_less()
    assert re.findall(r"^\| (?:as shipped|corrected|dense).*$", section, re.MULTILINE) == own
    others = [
        f"| {OTHER_NETWORKS[r['network']]}: {OWN[r['method']].removeprefix('as shipped, ')} {_measured(r)}"
        for r in rows
        if r["network"] in OTHER_NETWORKS
    ]
    assert re.findall(r"^\| (?:ResNet|ImageNet).*$", section, re.MULTILINE) == others
    son = [
        f"| {r['method']}, {r['setting']} | {r['ratio']:.1f} | {_points(r)} |"
        for r in mine
        if "Son" in r["method"]
    ]
    assert re.findall(r"^\| Son.*$", section, re.MULTILINE) == son


def test_its_ways_at_equal_bytes_are_those_of_the_benchmark():
    rows = json.loads((ROOT / "docs" / "recovery.json").read_text())["rows"]
    ways = {}
    for r in rows:
        if r["network"] == "vgg16-fashion" and r["share"] and "top1" in r:
            ways.setdefault(r["method"], {})[r["share"]] = f"{r['drop']:.2f}"
    expected = [
        f"| {name} | {' | '.join(found.get(share, '–') for share in (16, 24, 32, 48))} |"
        for name, found in ways.items()
    ]
    pattern = r"^\| (?:clustering, |kmeans|uniform|product|pruning|quantization).*$"
    assert re.findall(pattern, _lose_less(), re.MULTILINE) == expected


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def test_its_weights_representatives_and_prices_are_those_of_the_benchmark():
    rows = json.loads((ROOT / "docs" / "choices.json").read_text())["rows"]
    section, weights, kinds = _lose_less(), {}, {}
    for r in rows:
        if r["table"] == "weights":
            weights.setdefault((r["layer"], r["clusters"]), {})[r["kind"]] = r["kl"]
        elif r["table"] == "representatives":
            name = r["kind"] + (f", {r['scale_bits']} bits" if "scaled" in r["kind"] else "")
            name += ", for all" if r["scope"] == "global" else ", a layer"
            numbers = ["–"] * 3
            if r["clusters"]:
                numbers = [f"{r['clusters']:,}", f"{r['kl']:.3f}", f"{r['drop']:.1f}"]
            kinds.setdefault(name, {})[r["share"]] = numbers
        else:
            drop = f"{r['drop']:.1f} [{r['drop_low']:.1f}, {r['drop_high']:.1f}]"
            name = f"{r['method']}, {'for all' if r['scope'] == 'global' else 'a layer'}"
            megabytes = f"{r['bytes'] / 1e6:.2f}"
            assert _line(name, f"{r['clusters']:,}", megabytes, f"{r['kl']:.3f}", drop) in section
    for (layer, k), found in weights.items():
        best = min(found.values())
        cells = ("{}{:.4f}{}".format(*("**", x, "**") if x == best else ("", x, "")) for x in
                 (found[kind] for kind in ("uniform", "input", "output", "fisher", "hessian")))  # fmt: skip
        assert _line(f"{'all layers' if layer == 'all' else layer}, K = {k:,}", *cells) in section
    for name, found in kinds.items():
        assert _line(name, *found[16], *found[32]) in section


def test_the_checksums_of_the_data_are_those_the_code_checks():
    listed = dict(
        re.findall(
            r"^\| `([^`]+)` \| `([0-9a-f]{64})` \|$", (ROOT / "data/README.md").read_text(), re.MULTILINE
        )
    )
    expected = {f"FashionMNIST/raw/{name}": digest for name, digest in datasets.FASHION_FILES.items()}
    assert listed == expected | {models.FASHION_FILE: models.FASHION_SHA256}


def test_its_sizes_are_those_of_the_benchmark():
    run = json.loads((ROOT / "docs" / "memory.json").read_text())
    names = {"global": "one for all", "layer": "one a layer"}
    text = (ROOT / "README.md").read_text()
    for r in run["rows"]:
        sizes = [r["file (bytes)"], r["entropy of the indices (bytes)"], r["indices and tables (bytes)"]]
        sizes.append(min(r[f"{name} (bytes)"] for name in ("zip -9", "zstd -19", "7z")))
        ratios = [r[f"latency ratio, batch {batch}"] for batch in (1, 16, 64)]
        row = [names[r["scope"]], f"{r['K']:,}", *(f"{n_bytes / 1e6:.2f}" for n_bytes in sizes)]
        row += [f"{r['resident (bytes)'] / 1e6:.1f}", *(f"{ratio:.2f}" for ratio in ratios)]
        assert f"| {' | '.join(row)} |" in text


def test_its_times_of_sweeps_are_those_of_the_benchmark():
    run = json.loads((ROOT / "docs" / "sweeps.json").read_text())
    text = (ROOT / "README.md").read_text()
    named = {
        "plain calls": "plain calls, nothing stored",
        "one job": "`--jobs 1`",
        "two jobs": "`--jobs 2`",
        "dask, two jobs": "`--jobs 2 --backend dask`",
        "stored": "again, all stored",
        "papermill over a script": "a notebook by papermill, beyond the same lines as a script",
    }
    for key, name in named.items():
        seconds = run[f"{key} (s)"]
        assert f"| {name} (s) | {seconds:.{1 if seconds > 1 else 2}f} |" in text
    assert f"| {run['cells']} cells of VGG-16 " in text
    assert run["dask equals loky"]
    assert run["two jobs equal one"]


def test_its_pairs_neighbours_slider_and_maps_are_those_of_the_benchmark():
    run = json.loads((ROOT / "docs" / "similarity.json").read_text())
    text = (ROOT / "README.md").read_text()
    for r in run["pairs"]:
        speeds = [r["million pairs a second"], r["on one thread"], r.get("pdist and histogram")]
        shown = ["–" if speed is None else f"{speed:,.0f}" for speed in speeds]
        assert f"| {r['distance']} | {' | '.join(shown)} |" in text
    for r in run["nearest"]:
        seconds = [r["ours (s)"], r["cKDTree (s)"], r["scikit-learn (s)"]]
        shown = [f"{r['kernels']:,}", *(f"{s:.3g}" for s in seconds), f"{seconds[0] / seconds[1]:.3f}"]
        assert f"| {' | '.join(shown)} |" in text
    for r in run["slider"]:
        assert f"| {r['K up to']:,} | {r['median (s)']:.2f} | {r['95th percentile (s)']:.2f} |" in text
    for r in run["maps"]:
        numbers = f"{r['neighbours (s)']:.2f} | {r['layout (s)']:.1f} | {r['trustworthiness']:.3f}"
        assert f"| {r['kernels']:,} | {numbers} |" in text


def test_its_combinations_are_those_of_the_run():
    run = pd.read_csv(ROOT / "docs" / "orthogonality.csv", keep_default_na=False)
    run = run[run.order != "cluster first"]
    means = run.pivot_table(["ratio", "drop"], ["clustering", "sparsity"], "precision")
    drop = means["drop"]
    rows = [
        f"| {clusters} | {sparsity:.0%} | {row.int8:.1f} "
        + "".join(f"| {drop.loc[(clusters, sparsity), name]:.1f} " for name in ("none", "int8", "int4"))
        + "|"
        for (clusters, sparsity), row in means["ratio"].iterrows()
    ]
    printed = re.findall(
        r"^\| (?:none|\d+ (?:layer|global)) \| \d+% \|.*$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert len(printed) == 16
    assert set(printed) <= set(rows)


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
    assert workflow["jobs"]["report"]["env"]["PROFILE"] in profiles.names()
    uploaded = next(step for step in steps if "upload-artifact" in step.get("uses", ""))
    assert uploaded["with"]["path"] == "reports/"
    assert uploaded["if"] == "always()"  # also of a run that failed


def test_what_is_smaller_still_is_as_measured():
    rows = json.loads((ROOT / "docs" / "smallest.json").read_text())["rows"]
    found = {r["method"]: r for r in rows if "top1" in r}
    corrected, trained = (found[f"smaller K of 1/48, {step}"] for step in ("corrected", "trained"))
    text = " ".join(_lose_less().split())
    assert f"at 1/{corrected['ratio']:.1f} ({corrected['bytes'] / 1e6:.2f} MB)" in text
    ends = f"[{trained['drop_low']:.2f}, {trained['drop_high']:.2f}]"
    assert f"and {trained['drop']:.2f} {ends} after 100 steps" in text
    assert f"loses {_points(corrected).replace(' [', ' points [')} corrected" in text
    assert f"loses {found['clustering, corrected']['drop']:.2f} points" in text
    assert f"{found['clustering, trained']['drop']:.2f} once trained" in text
