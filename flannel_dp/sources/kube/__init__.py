"""Nodes of Kubernetes: a source of leases, and this node's annotations."""
