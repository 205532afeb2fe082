"""Item and user vectors, next-item models, counts and closed forms."""
