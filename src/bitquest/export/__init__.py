"""The packed format: specification, writer, reader."""
