"""Proof of life: packets that peers forward back, and what those say that do not return."""
