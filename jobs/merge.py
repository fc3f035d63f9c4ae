"""`python -m jobs.merge` in a checkout: what `python -m arm_ray.jobs.merge` is anywhere."""

import sys

from arm_ray.jobs.merge import main

if __name__ == "__main__":
    sys.exit(main())
