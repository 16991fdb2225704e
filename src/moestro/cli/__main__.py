"""`python -m moestro.cli`: the command line."""

from moestro.cli.app import main

main()
