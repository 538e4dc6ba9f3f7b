"""A run behind an HTTP interface: many texts at once, in memory that does not grow with them."""
