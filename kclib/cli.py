"""The command line, thin over the library: one function a command."""

import functools
import sys
from pathlib import Path
from typing import Annotated

import typer
import yaml

from kclib import bars, cli_sweeps, factories, files
from kclib.errors import FailedRunError, KclibError

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
    help="Cluster the 2D kernels of a CNN and see what it saves and costs.",
)  # fmt: skip
_debug = False  # whether errors end in a traceback: an option before the command

for _command in cli_sweeps.COMMANDS:
    app.command()(_command)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Cluster the 2D kernels of a CNN and see what it saves and costs."""
    global _debug
    _debug = debug


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
    from kclib import batch as runner
    from kclib import profiles

    changes = dict(_assignment(text) for text in change or ())
    index = runner.run(profiles.load(profile, changes=changes), out)
    typer.echo(f"report: {index.resolve()}")
    if show and sys.stdout.isatty():
        typer.launch(str(index.resolve()))


@app.command()
@cli_sweeps.aside
def compress(
    model: Annotated[str, typer.Argument(help="A name models.load knows, or package.module:factory.")],
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
    indices: Annotated[str, typer.Option(help="entropy or fixed: how indices are coded.")] = "entropy",
    scaled: Annotated[bool, typer.Option("--scaled", help="Each kernel has a scale.")] = False,
    turned: Annotated[bool, typer.Option("--turned", help="Kernels may be flipped and rotated.")] = False,
    seed: Annotated[int, typer.Option()] = 0,
    data: Annotated[
        str | None, typer.Option(help="Evaluate on this data set too, and keep the accuracy in the file.")
    ] = None,
    classes: _CLASSES = "",
    shape: _SHAPE = None,
) -> None:
    """Cluster a model's kernels and write it as a compressed file."""
    from kclib import checkpoint, clustering, compression, datasets, kernels, models

    files.check_output(out, binary=True)
    loaded = models.load(model, weights=weights, input_shape=shape)
    images = datasets.load(data) if data else None
    result = clustering.cluster(
        kernels.extract(loaded.network), clusters, scope=scope, scaled=scaled, turned=turned, seed=seed
    )
    for note in result.notes:
        typer.echo(note)
    small = compression.compress(loaded, result, precision=precision)
    accuracy, write = (
        None,
        functools.partial(checkpoint.save, small, out, architecture=model, indices=indices),
    )
    if not files.is_stream(out):  # which is written to once
        _show_written(write(), loaded.network, out)
    try:
        accuracy = (
            _accuracy(small, images, "cpu", classes) if data else None
        )  # other people's code, that may fail
    finally:
        if files.is_stream(out):
            _show_written(write(accuracy=accuracy), loaded.network, out)
        elif accuracy is not None:
            write(accuracy=accuracy)


def _show_written(contents, network, out: Path) -> None:
    """Print a file's bytes, part by part, beside those of the dense network, and where it is."""
    dense = sum(x.nbytes for x in (*network.parameters(), *network.buffers()))
    _show_bytes(contents)
    typer.echo(
        f"{dense / contents.bytes.sum():.2f} times smaller than the {dense:,} bytes of the dense weights"
    )
    typer.echo(files.named(out))


@app.command()
def inspect(file: Annotated[Path, typer.Argument(help="A file that compress wrote.")]) -> None:
    """Show what a compressed file holds, without its network."""
    from kclib import checkpoint

    contents = checkpoint.inspect(file)
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
    data: Annotated[str, typer.Option(help="A name datasets.load knows.")] = "fashion-mnist",
    limit: Annotated[int | None, typer.Option(help="So many images only, the same each time.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Its architecture, if the file names none or package.module:factory.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps.")] = "cpu",
    classes: _CLASSES = "",
    shape: _SHAPE = None,
) -> None:
    """Evaluate a compressed file's accuracy; its weights stay packed."""
    from kclib import checkpoint, datasets, models

    loaded = models.told(checkpoint.load(file, architecture=model, device=device), input_shape=shape)
    _accuracy(loaded, datasets.load(data, limit=limit), device, classes)


@app.command()
@cli_sweeps.aside
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
    from kclib import checkpoint, exporting, models
    from kclib.errors import InvalidValueError

    kind = out.suffix or (".onnx" if files.is_stream(out) else "")
    if kind not in (".onnx", ".pt2"):
        raise InvalidValueError(f"{out} ends in {out.suffix!r}; it must end in .onnx or .pt2.")
    files.check_output(out, binary=True)
    loaded = checkpoint.load(file, architecture=model)
    shape = shape or models.input_shape(loaded)
    if kind == ".onnx":
        exporting.to_onnx(loaded.network, out, shape, dense=dense)
    else:
        exporting.to_program(loaded.network, out, shape)
    typer.echo(
        files.named(out) if files.is_stream(out) else f"{files.named(out)}: {out.stat().st_size:,} bytes"
    )


def main() -> None:
    """Run the command line.

    A wrong input is one sentence and exit code 2, a failed run exit code 1, Ctrl-C exit code 130.
    """
    try:
        with bars.readable(), factories.own_modules():
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


def _accuracy(model, images, device: str, classes: str) -> float:
    """Evaluate and print top-1 accuracy with its interval; return it in percent."""
    from kclib import evaluation

    named = classes if classes in ("", "by position") else [name.strip() for name in classes.split(",")]
    answers = evaluation.evaluate(model, images, device=device, classes=named or None)
    typer.echo(f"top-1 {answers.top1} % of {answers.known.sum():,} images, in {answers.seconds:.0f} s")
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
