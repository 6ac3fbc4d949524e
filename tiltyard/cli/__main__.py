"""`python -m tiltyard.cli` is `tiltyard`."""

from tiltyard.cli import app

app()
