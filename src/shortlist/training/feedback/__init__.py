"""Feedback rules: what is learned from clicks whose conversions have not all arrived yet."""
