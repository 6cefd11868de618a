"""`python -m blockft`: the command line; the deepspeed launcher starts its workers with it."""

from blockft.cli import main

main()
