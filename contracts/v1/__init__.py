"""Generated from proto/contracts/v1 by `make proto`; never edited by hand."""
