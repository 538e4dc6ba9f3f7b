"""What trains several models and compares them."""
