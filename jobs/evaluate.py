"""`python -m jobs.evaluate` in a checkout: what `python -m arm_ray.jobs.evaluate` is anywhere."""

import sys

from arm_ray.jobs.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
