"""Weight importance scores."""
