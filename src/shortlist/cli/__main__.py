"""`python -m shortlist.cli` is the command `shortlist`."""

from shortlist.cli import main

main()
