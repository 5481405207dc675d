"""The command line, thin over the library: one function a command."""

import sys
from pathlib import Path
from typing import Annotated

import typer
import yaml

from kclib.errors import KclibError

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
    help="Cluster the 2D kernels of a CNN and see what it saves and costs.",
)  # fmt: skip


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

    changes = dict(_assignment(text) for text in change or ())
    index = runner.run(runner.load_profile(profile, changes=changes), out)
    typer.echo(f"report: {index.resolve()}")
    if show and sys.stdout.isatty():
        typer.launch(str(index.resolve()))


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Where the fp16 safetensors go.")],
    start: Annotated[
        Path | None,
        typer.Option(help="Safetensors of VGG-16 features; torchvision's own if not given."),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 12,
    seed: Annotated[int, typer.Option()] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps.")] = "cpu",
) -> None:
    """Train the shipped VGG-16 on Fashion-MNIST; a second call goes on where the first stopped."""
    from kclib import training

    trained = training.train_fashion(out, start, training.Recipe(epochs=epochs, seed=seed), device)
    typer.echo(f"{out.resolve()}: {trained.held_back:.2f} % on the held-back training images")


def main() -> None:
    """Run the command line; a wrong input is one sentence and exit code 2, a failed run exit code 1."""
    try:
        app(standalone_mode=True)
    except KclibError as error:
        typer.echo(f"kclib: {error}", err=True)
        from kclib.errors import NotebookError

        raise SystemExit(1 if isinstance(error, NotebookError) else 2) from None


def _assignment(text: str) -> tuple[str, object]:
    name, separator, value = text.partition("=")
    if not separator:
        raise typer.BadParameter(f"--set {text!r} must be name=value.")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise typer.BadParameter(f"the value of --set {text!r} is not plain YAML.") from error
