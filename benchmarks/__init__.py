"""Time and memory of mechedit beside the papers' published schedule."""
