"""What `bitquest bench` runs."""
