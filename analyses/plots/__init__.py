"""Figures that one script alone needs."""
