"""Request > completion event; release > swap."""
