"""Benchmarks of flannel_dp against what the kernel alone takes. See README.md here."""
