"""Pages that show what a plug does."""
