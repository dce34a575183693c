"""One protocol for everything that this node holds, and one loop over it."""
