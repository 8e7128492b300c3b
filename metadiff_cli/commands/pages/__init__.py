"""Report pages: plots, templates, style, script."""
