"""Events to the three sets that training reads, and the rules between them."""
