"""Reading and checking predictions, labels and options."""
