"""Firewall rules: masquerading, forwarding, and the guard of the tunnel's port."""
