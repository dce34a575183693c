"""Backends: what accepted leases mean as devices and as entries of the kernel's tables.

Pure functions: leases and facts about the node in, desired state out.
"""
