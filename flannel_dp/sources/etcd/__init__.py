"""flannel's keys in etcd: a source of leases, and this node's lease."""
