"""`python -m fourbit` is `fourbit`; so is `torchrun … -m fourbit`, in several processes."""

from fourbit.cli import main

main()
