"""``python -m kclib``, the same as the ``kclib`` command."""

from kclib.cli import main

main()
