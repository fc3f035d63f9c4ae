"""What stands for slow or distant parts in tests of other things."""
