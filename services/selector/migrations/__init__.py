"""The selector's tables, version by version."""
