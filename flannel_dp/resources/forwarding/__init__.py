"""Forwarding by an eBPF program: its maps, pins and filters."""
