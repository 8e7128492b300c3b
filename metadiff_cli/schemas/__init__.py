"""The JSON schemas of the documents that the commands print: NAME-VERSION.json for `"schema": "metadiff.NAME/VERSION"`."""
