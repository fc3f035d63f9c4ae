"""A study: a grid of experiments over a training run's merges, and the tables that it makes."""
