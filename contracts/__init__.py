"""What two packages agree on; imports nothing of ours and no ML framework."""
