"""Dataset > reward model > policy > release."""
