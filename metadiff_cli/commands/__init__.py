"""One file per subcommand: options -> configuration -> core -> console."""
