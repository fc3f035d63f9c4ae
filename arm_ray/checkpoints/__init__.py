"""Where weights come from and go. No arithmetic here beyond declared casts."""
