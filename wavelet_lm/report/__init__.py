"""Runs as tables and as a page: what their folders say of them."""
