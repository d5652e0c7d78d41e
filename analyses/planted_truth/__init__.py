"""Models whose recalling layers are known, to judge selection rules by."""
