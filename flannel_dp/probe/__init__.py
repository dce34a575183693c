"""Proof of life: packets that peers forward back, and what follows from those that do not return."""
