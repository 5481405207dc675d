"""The command line: one function a command, each a thin layer over the library."""

import contextlib
import functools
import os
import re
import shlex
import sys
import webbrowser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
import yaml
from typer.core import TyperCommand

import kclib
from kclib._util import files, limits, progress_bars, streams
from kclib.errors import FailedRunError, InvalidValueError, KclibError, SweepError
from kclib.models import _factories


class _Command(TyperCommand):
    """A command whose help names arguments as the usage line does; what they are, it says in words."""

    def format_options(self, ctx, formatter) -> None:
        """Write the arguments and the options, each kind in a section."""
        sections = {"argument": [], "option": []}
        for parameter in self.get_params(ctx):
            name, text = parameter.get_help_record(ctx)
            sections[parameter.param_type_name].append((re.sub(r" <[^>]*>$", "", name), text))
        for kind, rows in sections.items():
            if rows:
                with formatter.section(f"{kind.title()}s"):
                    formatter.write_dl(rows)


app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Cluster the 2D kernels of a CNN and see what it saves and costs.",
)  # fmt: skip
_debug = False  # whether errors end in a traceback: an option before the command


def _command(*examples: str, name: str | None = None) -> Callable[[Callable], Callable]:
    """Add a function as a command, with examples at the end of its help."""
    lines = "\n".join(f"  {example}" for example in examples)
    return app.command(name, cls=_Command, epilog=f"\b\nExamples:\n{lines}")


def _at_least_one(text: str | int) -> int:
    """Return a whole number from the command line, or a default, 1 or more."""
    text = str(text)
    if not text.strip().isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is not a whole number, 1 or more.")
    return int(text)


_PROFILE = Annotated[
    str, typer.Argument(metavar="PROFILE", help="smoke, full, imagenet, or the path of a YAML file.")
]
_OUT = Annotated[Path, typer.Option(metavar="FOLDER", help="Folder of the reports.")]
_NAMED_MODEL = "A name kclib.load_model knows, such as resnet18, or package.module:factory."
_MODEL = Annotated[str, typer.Argument(metavar="MODEL", help=_NAMED_MODEL)]
_FILE = Annotated[Path, typer.Argument(metavar="FILE", help="A file that compress wrote.")]
_ARCHITECTURE = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="Its architecture, if the file names none or package.module:factory."),
]
_NAMED_DATA = "A name kclib.load_data knows, such as fashion-mnist, or folder:PATH."
_K = {"metavar": "NUMBER", "parser": _at_least_one}
_CLASSES = Annotated[
    str,
    typer.Option(
        metavar="NAMES",
        help="Names of the network's outputs in their order, by commas; or 'by position', the data set's.",
    ),
]
_SHAPE = Annotated[
    tuple[int, int, int] | None,
    typer.Option(
        metavar="CHANNELS HEIGHT WIDTH", help="Shape of an input, where no preprocessing says what it is."
    ),
]


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"kclib {kclib.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Cluster the 2D kernels of a CNN and see what it saves and costs."""
    global _debug
    _debug = debug


def _aside(command: Callable) -> Callable:
    """Make a command that writes to standard output say all else on standard error."""

    @functools.wraps(command)
    def run(**given) -> None:
        printing = any(isinstance(x, Path) and files.is_stdout(x) for x in given.values())
        with streams.aside() if printing else contextlib.nullcontext():
            command(**given)

    return run


@_command(
    "kclib compress vgg16-fashion --clusters 4096 --data fashion-mnist -o small.safetensors",
    "kclib compress package.module:factory --weights checkpoint.pt --clusters 256 -o small.safetensors",
)
@_aside
def compress(
    model: _MODEL,
    clusters: Annotated[int, typer.Option(help="K, the clusters of a codebook: 1 or more.", **_K)],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            parser=files.output,
            help="The safetensors file to write; - is standard output.",
        ),
    ],
    scope: Annotated[
        str, typer.Option(metavar="SCOPE", help="layer or global: what shares a codebook.")
    ] = "layer",
    weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Weights in place of the model's own.")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="PRECISION",
            help="Of codebooks: fp32, fp16, bf16, int8 or int4; the model's own by default.",
        ),
    ] = None,
    linear: Annotated[
        str | None,
        typer.Option(
            metavar="PRECISION",
            help="Of linear layers' weights in the file: int8 or int4; by default they stay.",
        ),
    ] = None,
    indices: Annotated[
        str, typer.Option(metavar="CODING", help="entropy or fixed: how indices are coded.")
    ] = "entropy",
    scaled: Annotated[bool, typer.Option("--scaled", help="Each kernel has a scale.")] = False,
    turned: Annotated[bool, typer.Option("--turned", help="Kernels may be flipped and rotated.")] = False,
    seed: Annotated[int, typer.Option(metavar="NUMBER", help="Of the clustering.")] = 0,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA", help="Evaluate both networks on this data set, and keep the accuracy in the file."
        ),
    ] = None,
    classes: _CLASSES = "",
    shape: _SHAPE = None,
) -> None:
    """Cluster a model's kernels and write it as a compressed file."""
    limits.check_addresses()
    files.check_output(out, binary=True)
    with _step("loading the model"):
        loaded = kclib.load_model(model, weights=weights, input_shape=shape)
        images = kclib.load_data(data) if data else None
        bank = kclib.extract(loaded)
    result = kclib.cluster(bank, clusters, scope=scope, scaled=scaled, turned=turned, seed=seed)
    for note in result.notes:
        typer.echo(note)
    with _step("packing"):
        small = kclib.compress(loaded, result, precision=precision, linear=linear)
    accuracy, write = (
        None,
        functools.partial(kclib.save, small, out, architecture=model, indices=indices),
    )
    if not files.is_stream(out):  # which is written to once
        with _step("writing"):
            contents = write()
        _show_written(contents, loaded, out)
    try:
        accuracy = (
            _accuracy(small, images, "cpu", classes, dense=loaded) if data else None
        )  # other people's code, that may fail
    finally:
        if files.is_stream(out):
            _show_written(write(accuracy=accuracy), loaded, out)
        elif accuracy is not None:
            write(accuracy=accuracy)
    if not data:
        typer.echo(_not_measured(model, out, classes, shape))


@contextlib.contextmanager
def _step(what: str) -> Iterator[None]:
    """Show how long a part of the work has taken, from two seconds on, where nothing tells how far it is."""
    form = "{desc}: {elapsed}"
    with (
        progress_bars.tqdm(desc=what, delay=2, leave=False, bar_format=form) as bar,
        progress_bars.ticking(bar),
    ):
        yield


def _not_measured(model: str, out: Path, classes: str, shape: tuple[int, int, int] | None) -> str:
    """Return the sentence that says how the accuracy of a file is measured."""
    if files.is_stream(out):
        return "its accuracy was not measured; --data DATA does it"
    data = "fashion-mnist" if model == "vgg16-fashion" else "DATA"
    command = ["kclib", "evaluate", str(out), "--data", data]
    command += ["--model", model] if ":" in model else []
    command += ["--classes", classes] if classes else []
    command += ["--shape", *map(str, shape)] if shape else []
    where = "" if data != "DATA" else " (DATA: folder:PATH of its test images, or a name such as imagenet)"
    return f"its accuracy was not measured; this does it{where}:\n  {shlex.join(command)}"


def _show_written(contents, model, out: Path) -> None:
    """Print a file's bytes, part by part, beside those of the dense network, and where it is."""
    from kclib.compression import byte_counts

    dense = byte_counts.dense_bytes(model)
    _show_bytes(contents)
    typer.echo(
        f"{dense / contents.bytes.sum():.2f} times smaller than the {dense:,} bytes of the dense weights"
    )
    typer.echo(files.named(out))


@_command(
    "kclib inspect small.safetensors",
    "kclib inspect reports/try/small.safetensors",
)
def inspect(file: _FILE) -> None:
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


@_command(
    "kclib evaluate small.safetensors --limit 1000",
    "kclib evaluate small.safetensors --model package.module:factory --data folder:images",
)
def evaluate(
    file: _FILE,
    data: Annotated[str, typer.Option(metavar="DATA", help=_NAMED_DATA)] = "fashion-mnist",
    limit: Annotated[
        int | None, typer.Option(metavar="NUMBER", help="So many images only, the same each time.")
    ] = None,
    model: _ARCHITECTURE = None,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="cpu, cuda, mps.")] = "cpu",
    classes: _CLASSES = "",
    shape: _SHAPE = None,
) -> None:
    """Evaluate a compressed file's accuracy; its weights stay packed."""
    limits.check_addresses()
    from kclib.models import _model

    with _step("loading"):
        loaded = _model.told(kclib.load(file, architecture=model, device=device), input_shape=shape)
        images = kclib.load_data(data, limit=limit)
    _accuracy(loaded, images, device, classes)


@_command(
    "kclib export small.safetensors small.onnx", "kclib export small.safetensors dense.pt2 --shape 3 224 224"
)
@_aside
def export(
    file: _FILE,
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            parser=files.output,
            help="An .onnx file, or .pt2 for torch.export (dense); - is standard output, as ONNX.",
        ),
    ],
    dense: Annotated[bool, typer.Option("--dense", help="Dense weights in the ONNX file.")] = False,
    shape: Annotated[
        tuple[int, int, int] | None,
        typer.Option(metavar="CHANNELS HEIGHT WIDTH", help="Shape of an input; the model's own by default."),
    ] = None,
    model: _ARCHITECTURE = None,
) -> None:
    """Write a compressed file for other runtimes."""
    limits.check_addresses()
    with _step("exporting"):
        from kclib.compression import _exporting  # which takes seconds to import

        _exporting.kind_of(out)
        files.check_output(out, binary=True)
        loaded = kclib.load(file, architecture=model)
        kclib.export(loaded, out, shape=shape, dense=dense)
    typer.echo(
        files.named(out) if files.is_stream(out) else f"{files.named(out)}: {out.stat().st_size:,} bytes"
    )


@_command(
    "kclib try",
    "kclib try package.module:factory --data folder:images",
    name="try",
)
def first_try(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=_NAMED_MODEL)] = "vgg16-fashion",
    data: Annotated[str, typer.Option(metavar="DATA", help=_NAMED_DATA)] = "fashion-mnist",
    clusters: Annotated[int, typer.Option(help="K, for each layer: 1 or more.", **_K)] = 1024,
    limit: Annotated[int, typer.Option(help="Images to evaluate on: 1 or more.", **_K)] = 1000,
    weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Weights in place of the model's own.")
    ] = None,
    classes: _CLASSES = "",
    shape: _SHAPE = None,
    out: _OUT = Path("reports"),
    show: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = True,
) -> None:
    """Show in a minute what clustering a model saves and costs.

    By default it is the shipped one, on the shipped images.
    """
    limits.check_addresses()
    with _step("starting"):
        from kclib.experiments import _first_try

        loaded = kclib.load_model(model, weights=weights, input_shape=shape)
        images = kclib.load_data(data)
    result, page = _first_try.run(
        loaded, images, out / "try", n_clusters=clusters, limit=limit, classes=_names(classes)
    )
    for note in result.notes:
        typer.echo(note)
    typer.echo(f"\n{result.table.to_string()}\n\n{result.answer}\npage: {page.resolve()}\n\nGo further:")
    for command, what in _first_try.NEXT.items():
        typer.echo(f"  {command:<55}{what}")
    if show:
        _open(page)


def _open(page: Path) -> None:
    """Open a page in a browser that has windows; where there is none, nothing is done."""
    windows = sys.platform in ("darwin", "win32") or os.environ.keys() & {"DISPLAY", "WAYLAND_DISPLAY"}
    if windows and sys.stdout.isatty():
        with contextlib.suppress(OSError, webbrowser.Error):
            webbrowser.open(page.resolve().as_uri())


@_command("kclib sweep smoke --dry-run", "kclib sweep my.yaml --jobs 4")
def sweep(
    profile: _PROFILE,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the cells and what they take; compute none.")
    ] = False,
    jobs: Annotated[int, typer.Option(help="Cells side by side: 1 or more.", metavar="NUMBER")] = 1,
    backend: Annotated[str, typer.Option(metavar="NAME", help="Of joblib: loky, dask or ray.")] = "loky",
    scheduler: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS", help="Of a Dask scheduler or a Ray cluster; else one is started here."
        ),
    ] = "",
    rerun: Annotated[bool, typer.Option("--rerun", help="Compute again what is stored.")] = False,
    out: _OUT = Path("reports"),
) -> None:
    """Compute a sweep and write its report.

    What the store has of its cells is not computed again.
    """
    limits.check_addresses()
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
    files.check_output(out / loaded.name / "index.html")
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


@_command("kclib report smoke", "kclib report my.yaml --out elsewhere")
def report(profile: _PROFILE, out: _OUT = Path("reports")) -> None:
    """Write a profile's report anew, computing nothing.

    It is made from the store and the executed notebooks.
    """
    from kclib.experiments import _grid, _profiles, _reports

    loaded = _profiles.load(profile)
    _grid.report_stored(loaded, out)
    index = _reports.rebuild(out / loaded.name, loaded.name)
    typer.echo(f"report: {index.resolve()}")


@_command('kclib results --where "k == 4096"', "kclib results clustering --csv found.csv")
@_aside
def results(
    kind: Annotated[
        str, typer.Argument(metavar="KIND", help="What is stored: evaluation, clustering, curve ...")
    ] = "evaluation",
    where: Annotated[
        str,
        typer.Option(
            metavar="QUERY", help="A pandas query over the columns, such as \"scope == 'global' and k > 99\"."
        ),
    ] = "",
    columns: Annotated[
        str, typer.Option(metavar="NAMES", help="Names of the columns to show, by commas; all if empty.")
    ] = "",
    csv: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            parser=files.output,
            help="Write them all as CSV in place of showing them; - prints it.",
        ),
    ] = None,
    parquet: Annotated[
        Path | None,
        typer.Option(metavar="FILE", parser=files.output, help="Write them all as parquet; - as for CSV."),
    ] = None,
) -> None:
    """List what the store has, filtered."""
    from kclib.store import Store

    store = Store()
    if csv is not None and csv == parquet:
        raise InvalidValueError("--csv and --parquet name the same file; give each its own.")
    for path in filter(None, (csv, parquet)):
        files.check_output(path, binary=path is parquet)
    table = _filtered(store.table(kind), where, [x.strip() for x in columns.split(",") if x.strip()])
    for path, write in ((csv, "to_csv"), (parquet, "to_parquet")):
        if path is not None:
            # A file, for pyarrow takes no path but one of UTF-8.
            with files.replacing(path) as temporary, open(temporary, "wb") as file:
                getattr(table, write)(file, index=False)
            typer.echo(f"{files.named(path)}: {len(table):,} rows")
    if csv is None and parquet is None:
        typer.echo(_text(table) if len(table) else f"{store.root} has nothing like that.")


@_command("kclib gc --dry-run", "kclib gc --days 90 --yes")
def gc(
    days: Annotated[
        float | None, typer.Option(metavar="NUMBER", help="Remove entries older than so many days too.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go; remove nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove it without asking.")] = False,
) -> None:
    """Remove from the store what nobody will ask for.

    That is damaged, of earlier versions, or left by killed runs.
    """
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


@_command(
    "kclib compare reports/before reports/smoke", "kclib compare before.parquet after.parquet --max-drop 0.5"
)
@_aside
def compare(
    before: Annotated[
        Path, typer.Argument(metavar="BEFORE", help="results.parquet of a sweep, or its report's folder.")
    ],
    after: Annotated[Path, typer.Argument(metavar="AFTER", help="Of another run.")],
    max_drop: Annotated[
        float | None,
        typer.Option(
            metavar="POINTS", help="Fail (exit code 1) if a cell lost more points than this, or is gone."
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="FILE", parser=files.output, help="The page to write; - prints it.")
    ] = Path("changes.html"),
) -> None:
    """Show what moved between two runs of a sweep.

    Changes have intervals; --max-drop makes it a gate for CI.
    """
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


@_command(
    "kclib batch --profile smoke --set limit=500",
    "kclib batch --set model=package.module:factory --set data=folder:images",
)
def batch(
    profile: Annotated[
        str, typer.Option(metavar="PROFILE", help="smoke, full, imagenet, or the path of a YAML file.")
    ] = "smoke",
    out: _OUT = Path("reports"),
    change: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Replace a parameter; repeatable."),
    ] = None,
    jobs: Annotated[
        int,
        typer.Option(metavar="NUMBER", help="Notebooks side by side; 0: two where memory allows."),
    ] = 0,
    show: Annotated[bool, typer.Option("--open/--no-open", help="Open the report when done.")] = True,
) -> None:
    """Run a profile's notebooks and write a report."""
    limits.check_addresses()
    from kclib.experiments import _batch as runner
    from kclib.experiments import _profiles

    changes = dict(_assignment(text) for text in change or ())
    index = runner.run(_profiles.load(profile, changes=changes), out, jobs or runner.fitting_jobs())
    typer.echo(f"report: {index.resolve()}")
    if show and sys.stdout.isatty():
        typer.launch(str(index.resolve()))


def main() -> None:
    """Run the command line.

    A wrong input is one sentence and exit code 2, a failed run exit code 1, Ctrl-C exit code 130.
    """
    streams.reopen()
    try:
        try:
            with progress_bars.readable(), _factories.own_modules():
                app(args=[_at_home(x) for x in sys.argv[1:]], standalone_mode=True)
        finally:
            streams.flush()
    except SystemExit as end:
        if end.code == 130:
            streams.say("kclib: interrupted; what was finished is kept.")
        raise
    except Exception as error:
        if _debug:
            raise
        error = limits.told(streams.told(error))
        if isinstance(error, KclibError):
            streams.say(f"kclib: {error}")
            raise SystemExit(1 if isinstance(error, FailedRunError) else 2) from None
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        streams.say(f"kclib: {what}. This should not happen; kclib --debug shows where.")
        raise SystemExit(1) from None


def _at_home(argument: str) -> str:
    """Return an argument with the ``~/`` that the shell leaves as it is after a ``=``."""
    name, separator, value = argument.rpartition("=") if argument.startswith("-") else ("", "", argument)
    return f"{name}{separator}{Path(value).expanduser()}" if value.startswith("~/") else argument


def _accuracy(model, images, device: str, classes: str, dense=None) -> float:
    """Evaluate and print top-1 accuracy and, from a dense model, the drop; return the accuracy in percent."""
    options = {"device": device, "classes": _names(classes)}
    answers = kclib.evaluate(model, images, **options)
    typer.echo(f"top-1 {answers.top1} % of {answers.known.sum():,} images, in {answers.seconds:.0f} s")
    if dense is not None:
        before = kclib.evaluate(dense, images, **options)
        typer.echo(f"{kclib.drop(before, answers)}, from {before.top1} % of the dense network")
    for note in answers.notes:
        typer.echo(note)
    return answers.top1.estimate


def _names(classes: str) -> str | list[str] | None:
    """Return names of classes, as `kclib.evaluate` takes them, from the command line."""
    named = classes if classes in ("", "by position") else [name.strip() for name in classes.split(",")]
    return named or None


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
