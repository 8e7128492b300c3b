"""One folder per family of commands: options -> configuration -> core -> console."""
