"""Foreign systems, one file each."""
