"""Traffic per peer, counted by eBPF on the vxlan devices."""
