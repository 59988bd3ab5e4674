"""Sides of TRL: each runs in an environment of its own, driven over its standard input."""
