"""python -m bitwright.converter: the command line, for where the console script is not on the path."""

from bitwright.converter.cli import main

main()
