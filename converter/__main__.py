"""python -m converter: the command line, for where the console script is not on the path."""

from converter.cli import main

main()
