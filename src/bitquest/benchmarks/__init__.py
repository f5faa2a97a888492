"""What `bitquest bench` runs. Scripts and committed results live in the top-level benchmarks/."""
