"""Run batches one after the other, all notebooks in this process, in place of a kernel for each.

Starting a kernel takes longer than what the notebooks of a small network have to do. The argument is
JSON: those of the command line for each batch. The last line of the output has their exit codes and the
seconds of processor that each took, those of child processes included.
"""

import io
import json
import os
import sys
from contextlib import redirect_stdout

import torch
from IPython.core.displaypub import DisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from nbformat import v4
from papermill.engines import Engine, papermill_engines

from kclib import cli
from kclib.compression import latency


class _Publisher(DisplayPublisher):
    """Keeps what is displayed as outputs of a notebook."""

    def publish(self, data, metadata=None, **_):
        self.shown.append(v4.new_output("display_data", data=data, metadata=metadata or {}))


class _Shell(InteractiveShell):
    def enable_gui(self, gui=None):
        """Pictures are kept, not shown in windows."""


class InThisProcess(Engine):
    """Runs a notebook's cells one after the other in a shell that forgets what was before."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, **_):
        """Execute all cells; what one raises is written into the notebook, and ends it."""
        shell = _Shell.instance(display_pub_class=_Publisher)
        shell.reset(new_session=True)
        shell.enable_matplotlib("inline")
        for index, cell in enumerate(nb_man.nb.cells):
            if cell.cell_type != "code":
                continue
            nb_man.cell_start(cell, index)
            error = _run(shell, cell)
            if error is not None:
                nb_man.cell_exception(cell, cell_index=index, exception=error)
                return
            nb_man.cell_complete(cell, cell_index=index)


def _run(shell: InteractiveShell, cell) -> Exception | None:
    """Run a cell, give it its outputs, and return what it raised."""
    shell.display_pub.shown = cell.outputs = []
    with redirect_stdout(io.StringIO()) as said:
        result = shell.run_cell(cell.source)
    cell.execution_count = shell.execution_count
    if text := said.getvalue():
        cell.outputs.insert(0, v4.new_output("stream", name="stdout", text=text))
    if result.result is not None:
        data, metadata = shell.display_formatter.format(result.result)
        cell.outputs.append(v4.new_output("display_data", data=data, metadata=metadata))
    error = result.error_before_exec or result.error_in_exec
    if error is not None:
        cell.outputs.append(v4.new_output("error", ename=type(error).__name__, evalue=str(error)))
    return error


def _main() -> None:
    torch.set_num_threads(1)
    latency._SECONDS = 0.05
    papermill_engines.register(None, InThisProcess)
    ended = []
    for arguments in json.loads(sys.argv[1]):
        sys.argv, before = ["kclib", *arguments], sum(os.times()[:4])
        try:
            cli.main()
        except SystemExit as exit_:
            ended.append((exit_.code, sum(os.times()[:4]) - before))
    print(json.dumps(ended))


if __name__ == "__main__":
    _main()
