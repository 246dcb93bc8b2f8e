"""Studies: every order on many loads, without a model."""
