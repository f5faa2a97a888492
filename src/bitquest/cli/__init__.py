"""The `bitquest` command, one short file per subcommand."""
