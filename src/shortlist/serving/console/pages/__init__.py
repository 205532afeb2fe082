"""One file per page; each has a `show(console)` that lays the page out and keeps it up to date."""
