"""`python -m moestro`: the command line."""

from moestro.cli.app import main

main()
