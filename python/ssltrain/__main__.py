"""python -m ssltrain: the command line."""

from ssltrain.cli import main

main()
