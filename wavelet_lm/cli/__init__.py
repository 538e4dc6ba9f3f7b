"""What can be typed: every command, and the only home of its options and of standard output."""
