"""Suites that measure the system; each writes results/<suite>.json with machine and commit."""
