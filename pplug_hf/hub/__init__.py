"""Sharing plugs: pushing them to the Hub, and their model cards."""
