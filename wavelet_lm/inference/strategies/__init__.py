"""Ways to choose tokens that read ahead."""
