"""What the server offers, one file per surface; `app.py` puts them together."""
