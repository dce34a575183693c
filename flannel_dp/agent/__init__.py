"""The agent: keeps the kernel in agreement with a source, and runs as a service."""
