"""Networks of the studies and their convolutions."""
