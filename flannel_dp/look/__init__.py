"""What the kernel holds and why, for a person or a program. Reads, never writes."""
