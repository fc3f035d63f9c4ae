"""`python -m arm_ray.cli`."""

import sys

from arm_ray.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
