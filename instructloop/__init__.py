"""Composition root: the only code that sees every package."""
