"""The audit as text, figures and an HTML page."""
