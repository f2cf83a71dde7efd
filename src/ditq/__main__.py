"""``python -m ditq`` is ``ditq``."""

from ditq.cli import main

main()
