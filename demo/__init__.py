"""The one-command round: a small world of tasks, and simulated people with a known taste."""
