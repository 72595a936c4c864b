"""`python -m puna` and `torchrun -m puna`."""

from puna.cli import main

main()
