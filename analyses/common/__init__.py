"""What the papers' scripts share."""
