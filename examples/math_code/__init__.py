"""A study of mathematics and code, with a larger model than the demo's."""
