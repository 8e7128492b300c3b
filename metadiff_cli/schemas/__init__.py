"""JSON schemas of what the commands print: NAME-VERSION.json for `"schema": "metadiff.NAME/VERSION"`."""
