"""Entry points for ``ray job submit``: parse the arguments, call the library, exit."""
