"""The report of a run as one HTML page: what is on it, and how it is drawn."""
