"""`python -m jobs.attach` in a checkout: what `python -m arm_ray.jobs.attach` is anywhere."""

import sys

from arm_ray.jobs.attach import main

if __name__ == "__main__":
    sys.exit(main())
