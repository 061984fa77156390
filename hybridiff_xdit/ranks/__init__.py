"""What the ranks exchange, and what must be the same on all of them."""
