"""The command line: one function a command, each a thin layer over the library."""

import contextlib
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
import yaml

import kclib
from kclib._util import files, progress_bars
from kclib.errors import FailedRunError, InvalidValueError, KclibError, SweepError
from kclib.models import _factories

_PROFILE = Annotated[str, typer.Argument(help="smoke, full, imagenet, or the path of a YAML file.")]
_OUT = Annotated[Path, typer.Option(help="Folder of the reports.")]
app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
    help="Cluster the 2D kernels of a CNN and see what it saves and costs.",
)  # fmt: skip
_debug = False  # whether errors end in a traceback: an option before the command

_CLASSES = Annotated[
    str,
    typer.Option(
        help="Names of the network's outputs in their order, by commas; or 'by position', the data set's."
    ),
]
_SHAPE = Annotated[
    tuple[int, int, int] | None,
    typer.Option(help="Channels, height, width of an input, where no preprocessing says so."),
]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Cluster the 2D kernels of a CNN and see what it saves and costs."""
    global _debug
    _debug = debug


def _aside(command: Callable) -> Callable:
    """Make a command that writes to standard output say all else on standard error."""

    @functools.wraps(command)
    def run(**given) -> None:
        printing = any(isinstance(x, Path) and files.is_stdout(x) for x in given.values())
        with contextlib.redirect_stdout(sys.stderr) if printing else contextlib.nullcontext():
            command(**given)

    return run


@app.command()
def sweep(
    profile: _PROFILE,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the cells and what they take; compute none.")
    ] = False,
    jobs: Annotated[int, typer.Option(help="Cells side by side.")] = 1,
    backend: Annotated[str, typer.Option(help="Of joblib: loky, dask or ray.")] = "loky",
    scheduler: Annotated[
        str, typer.Option(help="Address of a Dask scheduler or a Ray cluster; else one is started here.")
    ] = "",
    rerun: Annotated[bool, typer.Option("--rerun", help="Compute again what is stored.")] = False,
    out: _OUT = Path("reports"),
) -> None:
    """Compute the cells of a profile's sweep that the store does not have, and write their report."""
    from kclib.experiments import _grid
    from kclib.experiments._pool import Workers
    from kclib.store import Store

    loaded, workers, store = _profile(profile), Workers(jobs, backend, scheduler), Store()
    planned = _grid.plan(loaded.sweep, store, rerun=rerun)
    if dry_run:
        typer.echo(_text(_grid.as_table(planned)))
    typer.echo(_grid.summary(planned, workers))
    if dry_run:
        return
    failures = _grid.run(planned, workers)
    for failure in failures:
        typer.echo(f"{failure.what} failed: {failure.error}", err=True)
    index = _grid.report(loaded, planned, store, failures, out)
    typer.echo(f"report: {index.resolve()}")
    if failures:
        raise SweepError(
            f"{len(failures)} of {len(planned)} cells failed; {index} has their tracebacks, all others are "
            "stored, and the same command tries again."
        )


@app.command()
def report(profile: _PROFILE, out: _OUT = Path("reports")) -> None:
    """Write a profile's report anew, from the store and the executed notebooks; compute nothing."""
    from kclib.experiments import _grid, _profiles, _reports
    from kclib.store import Store

    loaded, store = _profiles.load(profile), Store()
    if loaded.sweep is not None:
        tasks = _grid.plan(loaded.sweep, store, estimated=False)
        if any(task.stored for task in tasks):
            missing = {str(task) for task in tasks if not task.stored}
            failures = _reports.read(out / loaded.name, loaded.name).failures
            _grid.report(loaded, tasks, store, [x for x in failures if x.what in missing], out)
    index = _reports.rebuild(out / loaded.name, loaded.name)
    typer.echo(f"report: {index.resolve()}")


@app.command()
@_aside
def results(
    kind: Annotated[
        str, typer.Argument(help="What is stored: evaluation, clustering, curve ...")
    ] = "evaluation",
    where: Annotated[
        str, typer.Option(help="A pandas query over the columns, such as \"scope == 'global' and k > 99\".")
    ] = "",
    columns: Annotated[str, typer.Option(help="Names of the columns to show, by commas; all if empty.")] = "",
    csv: Annotated[
        Path | None,
        typer.Option(
            parser=files.output, help="Write them all as CSV in place of showing them; - prints it."
        ),
    ] = None,
    parquet: Annotated[
        Path | None, typer.Option(parser=files.output, help="Write them all as parquet; - as for CSV.")
    ] = None,
) -> None:
    """List what the store has, filtered."""
    from kclib.store import Store

    store = Store()
    for path in filter(None, (csv, parquet)):
        files.check_output(path, binary=path is parquet)
    table = _filtered(store.table(kind), where, [x.strip() for x in columns.split(",") if x.strip()])
    for path, write in ((csv, "to_csv"), (parquet, "to_parquet")):
        if path is not None:
            with files.replacing(path) as temporary:
                getattr(table, write)(temporary, index=False)
            typer.echo(f"{files.named(path)}: {len(table):,} rows")
    if csv is None and parquet is None:
        typer.echo(_text(table) if len(table) else f"{store.root} has nothing like that.")


@app.command()
def gc(
    days: Annotated[float | None, typer.Option(help="Remove entries older than this too.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go; remove nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove it without asking.")] = False,
) -> None:
    """Remove from the store what nobody will ask for: damaged, of earlier versions, left by killed runs."""
    from kclib.store import Store

    def agree(garbage) -> bool:
        _show_garbage(garbage, "would go")
        if not (yes or sys.stdin.isatty()):
            raise InvalidValueError("nobody is there to agree, so nothing is removed; give --yes.")
        return yes or typer.confirm(f"Remove them from {store.root}?")

    store = Store()
    garbage = store.gc(days=days, dry_run=dry_run, agree=agree)
    if dry_run:
        _show_garbage(garbage, "would go")
    else:
        typer.echo(f"{len(garbage):,} files, {garbage.bytes.sum():,} bytes removed")


@app.command()
@_aside
def compare(
    before: Annotated[Path, typer.Argument(help="results.parquet of a sweep, or its report's folder.")],
    after: Annotated[Path, typer.Argument(help="Of another run.")],
    max_drop: Annotated[
        float | None,
        typer.Option(help="Fail (exit code 1) if a cell lost more points than this, or is gone."),
    ] = None,
    out: Annotated[Path, typer.Option(parser=files.output, help="The page to write; - prints it.")] = Path(
        "changes.html"
    ),
) -> None:
    """Show what moved between two runs of a sweep, with intervals; a gate for CI."""
    from kclib.experiments import _compare as experiments_compare

    files.check_output(out)
    table = experiments_compare.compare(experiments_compare.read(before), experiments_compare.read(after))
    sentences = experiments_compare.broken(table, max_drop) if max_drop is not None else []
    experiments_compare.write(out, table, sentences, before=str(before), after=str(after))
    typer.echo(experiments_compare.answer(table))
    typer.echo(f"page: {files.named(out)}")
    if sentences:
        for sentence in sentences:
            typer.echo(sentence, err=True)
        raise SweepError(
            f"{len(sentences)} of {len(table)} cells lost more than {max_drop:g} points or are gone."
        )


def _profile(name: str):
    """Read a profile that has a sweep."""
    from kclib.experiments import _profiles

    loaded = _profiles.load(name)
    if loaded.sweep is None:
        raise InvalidValueError(f"profile {name} has no sweep; it must have the key 'sweep'.")
    return loaded


def _show_garbage(garbage, what: str) -> None:
    if len(garbage):
        typer.echo(_text(garbage))
    typer.echo(f"{len(garbage):,} files, {garbage.bytes.sum():,} bytes {what}")


def _text(table) -> str:
    """Return a table for a terminal; long values are cut."""
    short = table.map(lambda x: f"{x:g}" if isinstance(x, float) and x == x else x)
    return short.astype("string").fillna("").to_string(index=False, max_colwidth=40)


def _filtered(table, where: str, columns: list[str]):
    """Return the rows and columns that are asked for."""
    from kclib._util import checks
    from kclib.errors import reason

    if where and len(table):
        try:
            table = table.query(where)
        except Exception as error:  # pandas says in many ways what a query lacks
            raise InvalidValueError(
                f"--where {where!r} is no query over the columns ({reason(error)})."
            ) from error
    if len(table):
        for column in columns:
            checks.check_known("column", column, table.columns)
    return table[columns] if columns and len(table) else table


@app.command()
def batch(
    profile: Annotated[
        str, typer.Option(help="smoke, full, imagenet, or the path of a YAML file.")
    ] = "smoke",
    out: Annotated[Path, typer.Option(help="Folder for the reports.")] = Path("reports"),
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="name=value: replace a parameter; repeatable."),
    ] = None,
    show: Annotated[bool, typer.Option("--open/--no-open", help="Open the report when done.")] = True,
) -> None:
    """Run the notebooks of a profile in order and write a report."""
    from kclib.experiments import _batch as runner
    from kclib.experiments import _profiles

    changes = dict(_assignment(text) for text in change or ())
    index = runner.run(_profiles.load(profile, changes=changes), out)
    typer.echo(f"report: {index.resolve()}")
    if show and sys.stdout.isatty():
        typer.launch(str(index.resolve()))


@app.command()
@_aside
def compress(
    model: Annotated[str, typer.Argument(help="A name kclib.load_model knows, or package.module:factory.")],
    clusters: Annotated[int, typer.Option(min=1, help="K, clusters a group.")],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", parser=files.output, help="The safetensors file to write; - is standard output."
        ),
    ],
    scope: Annotated[str, typer.Option(help="layer or global: what shares a codebook.")] = "layer",
    weights: Annotated[Path | None, typer.Option(help="Weights in place of the model's own.")] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="Of codebooks: fp32, fp16, bf16, int8 or int4; the model's own by default."),
    ] = None,
    linear: Annotated[
        str | None,
        typer.Option(help="Of linear layers' weights in the file: int8 or int4; by default they stay."),
    ] = None,
    indices: Annotated[str, typer.Option(help="entropy or fixed: how indices are coded.")] = "entropy",
    scaled: Annotated[bool, typer.Option("--scaled", help="Each kernel has a scale.")] = False,
    turned: Annotated[bool, typer.Option("--turned", help="Kernels may be flipped and rotated.")] = False,
    seed: Annotated[int, typer.Option()] = 0,
    data: Annotated[
        str | None,
        typer.Option(help="Evaluate both networks on this data set, and keep the accuracy in the file."),
    ] = None,
    classes: _CLASSES = "",
    shape: _SHAPE = None,
) -> None:
    """Cluster a model's kernels and write it as a compressed file."""

    files.check_output(out, binary=True)
    loaded = kclib.load_model(model, weights=weights, input_shape=shape)
    images = kclib.load_data(data) if data else None
    result = kclib.cluster(
        kclib.extract(loaded), clusters, scope=scope, scaled=scaled, turned=turned, seed=seed
    )
    for note in result.notes:
        typer.echo(note)
    small = kclib.compress(loaded, result, precision=precision, linear=linear)
    accuracy, write = (
        None,
        functools.partial(kclib.save, small, out, architecture=model, indices=indices),
    )
    if not files.is_stream(out):  # which is written to once
        _show_written(write(), loaded, out)
    try:
        accuracy = (
            _accuracy(small, images, "cpu", classes, dense=loaded) if data else None
        )  # other people's code, that may fail
    finally:
        if files.is_stream(out):
            _show_written(write(accuracy=accuracy), loaded, out)
        elif accuracy is not None:
            write(accuracy=accuracy)


def _show_written(contents, model, out: Path) -> None:
    """Print a file's bytes, part by part, beside those of the dense network, and where it is."""
    from kclib.compression import byte_counts

    dense = byte_counts.dense_bytes(model)
    _show_bytes(contents)
    typer.echo(
        f"{dense / contents.bytes.sum():.2f} times smaller than the {dense:,} bytes of the dense weights"
    )
    typer.echo(files.named(out))


@app.command()
def inspect(file: Annotated[Path, typer.Argument(help="A file that compress wrote.")]) -> None:
    """Show what a compressed file holds, without its network."""
    from kclib.compression import _container

    contents = _container.inspect(file)
    about = contents.description
    accuracy = "unknown" if about["accuracy"] is None else f"{about['accuracy']:.2f} %"
    typer.echo(
        f"architecture {about['architecture']}, accuracy {accuracy}, written by kclib {about['kclib']}"
    )
    typer.echo(f"SHA-256 of the contents {contents.sha256}")
    layers = contents.layers
    if (layers.same_as == layers.index).all():
        layers = layers.drop(columns="same_as")
    typer.echo(f"\n{contents.groups.to_string()}\n\n{layers.to_string()}\n")
    _show_bytes(contents)


@app.command()
def evaluate(
    file: Annotated[Path, typer.Argument(help="A file that compress wrote.")],
    data: Annotated[str, typer.Option(help="A name kclib.load_data knows.")] = "fashion-mnist",
    limit: Annotated[int | None, typer.Option(help="So many images only, the same each time.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Its architecture, if the file names none or package.module:factory.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps.")] = "cpu",
    classes: _CLASSES = "",
    shape: _SHAPE = None,
) -> None:
    """Evaluate a compressed file's accuracy; its weights stay packed."""

    from kclib.models import _model

    loaded = _model.told(kclib.load(file, architecture=model, device=device), input_shape=shape)
    _accuracy(loaded, kclib.load_data(data, limit=limit), device, classes)


@app.command()
@_aside
def export(
    file: Annotated[Path, typer.Argument(help="A file that compress wrote.")],
    out: Annotated[
        Path,
        typer.Argument(
            parser=files.output,
            help="An .onnx file, or .pt2 for torch.export (dense); - is standard output, as ONNX.",
        ),
    ],
    dense: Annotated[bool, typer.Option("--dense", help="Dense weights in the ONNX file.")] = False,
    shape: Annotated[
        tuple[int, int, int] | None, typer.Option(help="Channels, height, width; the model's own by default.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Its architecture, if the file names none or package.module:factory.")
    ] = None,
) -> None:
    """Write a compressed file for other runtimes."""
    from kclib.compression import _exporting

    _exporting.kind_of(out)
    files.check_output(out, binary=True)
    loaded = kclib.load(file, architecture=model)
    kclib.export(loaded, out, shape=shape, dense=dense)
    typer.echo(
        files.named(out) if files.is_stream(out) else f"{files.named(out)}: {out.stat().st_size:,} bytes"
    )


def main() -> None:
    """Run the command line.

    A wrong input is one sentence and exit code 2, a failed run exit code 1, Ctrl-C exit code 130.
    """
    try:
        with progress_bars.readable(), _factories.own_modules():
            app(args=[_at_home(x) for x in sys.argv[1:]], standalone_mode=True)
    except SystemExit as end:
        if end.code == 130:
            typer.echo("kclib: interrupted; what was finished is kept.", err=True)
        raise
    except Exception as error:
        if _debug:
            raise
        if isinstance(error, KclibError):
            typer.echo(f"kclib: {error}", err=True)
            raise SystemExit(1 if isinstance(error, FailedRunError) else 2) from None
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        typer.echo(f"kclib: {what}. This should not happen; kclib --debug shows where.", err=True)
        raise SystemExit(1) from None


def _at_home(argument: str) -> str:
    """Return an argument with the ``~/`` that the shell leaves as it is after a ``=``."""
    name, separator, value = argument.rpartition("=") if argument.startswith("-") else ("", "", argument)
    return f"{name}{separator}{Path(value).expanduser()}" if value.startswith("~/") else argument


def _accuracy(model, images, device: str, classes: str, dense=None) -> float:
    """Evaluate and print top-1 accuracy and, from a dense model, the drop; return the accuracy in percent."""

    named = classes if classes in ("", "by position") else [name.strip() for name in classes.split(",")]
    options = {"device": device, "classes": named or None}
    answers = kclib.evaluate(model, images, **options)
    typer.echo(f"top-1 {answers.top1} % of {answers.known.sum():,} images, in {answers.seconds:.0f} s")
    if dense is not None:
        before = kclib.evaluate(dense, images, **options)
        typer.echo(f"{kclib.drop(before, answers)}, from {before.top1} % of the dense network")
    for note in answers.notes:
        typer.echo(note)
    return answers.top1.estimate


def _show_bytes(contents) -> None:
    for part, n_bytes in contents.bytes[contents.bytes > 0].items():
        typer.echo(f"{n_bytes:>14,}  {part}")
    typer.echo(f"{contents.bytes.sum():>14,}  bytes in all")


def _assignment(text: str) -> tuple[str, object]:
    name, separator, value = text.partition("=")
    if not separator:
        raise typer.BadParameter(f"--set {text!r} must be name=value.")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise typer.BadParameter(f"the value of --set {text!r} is not plain YAML.") from error
