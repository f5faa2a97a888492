"""Pure torch, no dispatch, no I/O: the definition of the method."""
