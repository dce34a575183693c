"""What a cluster says: its network, its leases, and which of them are accepted. Pure."""
