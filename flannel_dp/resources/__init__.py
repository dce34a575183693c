"""What this node holds, one resource each: none imports another."""
