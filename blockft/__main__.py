"""`python -m blockft`, which is also how the deepspeed launcher starts its workers."""

from blockft.cli import main

main()
