"""`python -m jobs.study` in a checkout: what `python -m arm_ray.jobs.study` is anywhere."""

import sys

from arm_ray.jobs.study import main

if __name__ == "__main__":
    sys.exit(main())
