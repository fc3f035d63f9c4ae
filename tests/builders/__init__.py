"""What tests are given and what they compare: nothing here is a test."""
