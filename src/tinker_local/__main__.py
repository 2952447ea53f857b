"""`python -m tinker_local` is `tinker-local`."""

from tinker_local.cli import main

main()
