"""How a policy compares with its parent: win rates, divergence, held-out language modelling."""
