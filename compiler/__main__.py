"""`python -m gammac` is `gammac`."""

from gammac.cli import main

main()
