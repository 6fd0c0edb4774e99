"""`python -m evosearch` is the console script."""

from evosearch.cli import main

main()
