"""What each scale of a model sees in a text: measured, and drawn."""
