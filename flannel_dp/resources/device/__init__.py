"""The vxlan device: what is wanted, what differs, and how it is written."""
