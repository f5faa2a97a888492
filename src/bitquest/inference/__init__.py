"""Running a packed model: key-value cache, sampling, the generation loop."""
