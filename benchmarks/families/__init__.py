"""What each model type of transformers can do: every step on a small random model, and the table of results."""
