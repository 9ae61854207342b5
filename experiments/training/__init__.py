"""Training steps, and programs over many replicates."""
