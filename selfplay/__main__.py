"""`python -m selfplay` is `selfplay`."""

from selfplay.cli import main

main()
