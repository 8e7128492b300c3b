"""The method itself, in torch: knows no screen, no command line and no path it was not given."""
