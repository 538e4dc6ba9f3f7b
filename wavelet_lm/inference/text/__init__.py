"""From tokens to what is shown."""
