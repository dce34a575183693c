"""Keep one Linux node's VXLAN overlay in agreement with a cluster's leases."""
