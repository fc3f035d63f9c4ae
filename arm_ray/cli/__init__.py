"""`arm-ray`: the command line. It parses, calls, and turns errors into exit codes.

Exit codes: 0 success, 1 an error that the message explains, 2 a wrong command line, 130 interrupted
(run the same command again to go on), 141 where nobody reads the output any more.

What a command needs is imported by the command: help comes at once, and a typing error in a
configuration before anything heavy is loaded.
"""

from arm_ray.cli.entry import main

__all__ = ["main"]
