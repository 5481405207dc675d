"""Commands over sweeps: compute one, look into the store, tidy it, write reports, compare two runs."""

import contextlib
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from kclib import files
from kclib.errors import InvalidValueError, SweepError

_PROFILE = Annotated[str, typer.Argument(help="smoke, full, imagenet, or the path of a YAML file.")]
_OUT = Annotated[Path, typer.Option(help="Folder of the reports.")]


def aside(command: Callable) -> Callable:
    """Make a command that writes to standard output say all else on standard error."""

    @functools.wraps(command)
    def run(**given) -> None:
        printing = any(isinstance(x, Path) and files.is_stdout(x) for x in given.values())
        with contextlib.redirect_stdout(sys.stderr) if printing else contextlib.nullcontext():
            command(**given)

    return run


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
    from kclib import grid
    from kclib.jobs import Workers
    from kclib.store import Store

    found, workers, store = _profile(profile), Workers(jobs, backend, scheduler), Store()
    planned = grid.plan(found.sweep, store, rerun=rerun)
    if dry_run:
        typer.echo(_text(grid.as_table(planned)))
    typer.echo(grid.summary(planned, workers))
    if dry_run:
        return
    failures = grid.run(planned, workers)
    for failure in failures:
        typer.echo(f"{failure.what} failed: {failure.error}", err=True)
    index = grid.report(found, planned, store, failures, out)
    typer.echo(f"report: {index.resolve()}")
    if failures:
        raise SweepError(
            f"{len(failures)} of {len(planned)} cells failed; {index} has their tracebacks, all others are "
            "stored, and the same command tries again."
        )


def report(profile: _PROFILE, out: _OUT = Path("reports")) -> None:
    """Write a profile's report anew, from the store and the executed notebooks; compute nothing."""
    from kclib import grid, profiles, reports
    from kclib.store import Store

    found, store = profiles.load(profile), Store()
    if found.sweep is not None:
        tasks = grid.plan(found.sweep, store, estimated=False)
        if any(task.stored for task in tasks):
            missing = {str(task) for task in tasks if not task.stored}
            failures = reports.read(out / found.name, found.name).failures
            grid.report(found, tasks, store, [x for x in failures if x.what in missing], out)
    index = reports.rebuild(out / found.name, found.name)
    typer.echo(f"report: {index.resolve()}")


@aside
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
    found = _filtered(store.table(kind), where, [x.strip() for x in columns.split(",") if x.strip()])
    for path, write in ((csv, "to_csv"), (parquet, "to_parquet")):
        if path is not None:
            with files.replacing(path) as temporary:
                getattr(found, write)(temporary, index=False)
            typer.echo(f"{files.named(path)}: {len(found):,} rows")
    if csv is None and parquet is None:
        typer.echo(_text(found) if len(found) else f"{store.root} has nothing like that.")


def gc(
    days: Annotated[float | None, typer.Option(help="Remove entries older than this too.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go; remove nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove it without asking.")] = False,
) -> None:
    """Remove from the store what nobody will ask for: damaged, of earlier versions, left by killed runs."""
    from kclib.store import Store

    def agree(found) -> bool:
        _show_garbage(found, "would go")
        if not (yes or sys.stdin.isatty()):
            raise InvalidValueError("nobody is there to agree, so nothing is removed; give --yes.")
        return yes or typer.confirm(f"Remove them from {store.root}?")

    store = Store()
    found = store.gc(days=days, dry_run=dry_run, agree=agree)
    if dry_run:
        _show_garbage(found, "would go")
    else:
        typer.echo(f"{len(found):,} files, {found.bytes.sum():,} bytes removed")


@aside
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
    from kclib import changes

    files.check_output(out)
    table = changes.compare(changes.read(before), changes.read(after))
    sentences = changes.broken(table, max_drop) if max_drop is not None else []
    changes.write(out, table, sentences, before=str(before), after=str(after))
    typer.echo(changes.answer(table))
    typer.echo(f"page: {files.named(out)}")
    if sentences:
        for sentence in sentences:
            typer.echo(sentence, err=True)
        raise SweepError(
            f"{len(sentences)} of {len(table)} cells lost more than {max_drop:g} points or are gone."
        )


COMMANDS = (sweep, report, results, gc, compare)


def _profile(name: str):
    """Read a profile that has a sweep."""
    from kclib import profiles

    found = profiles.load(name)
    if found.sweep is None:
        raise InvalidValueError(f"profile {name} has no sweep; it must have the key 'sweep'.")
    return found


def _show_garbage(found, what: str) -> None:
    if len(found):
        typer.echo(_text(found))
    typer.echo(f"{len(found):,} files, {found.bytes.sum():,} bytes {what}")


def _text(table) -> str:
    """Return a table for a terminal; long values are cut."""
    short = table.map(lambda x: f"{x:g}" if isinstance(x, float) and x == x else x)
    return short.astype("string").fillna("").to_string(index=False, max_colwidth=40)


def _filtered(table, where: str, columns: list[str]):
    """Return the rows and columns that are asked for."""
    from kclib import checks
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
