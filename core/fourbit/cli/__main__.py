"""`python -m fourbit.cli` is `fourbit`."""

from fourbit.cli import main

main()
