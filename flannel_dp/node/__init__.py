"""This node: its external interface, its addresses, and what it needs for each family."""
