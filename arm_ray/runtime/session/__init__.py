"""What people and machines are shown while something runs."""
