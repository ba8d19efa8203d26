"""`python -m palate.cli` is `palate`."""

from palate.cli import main

main()
