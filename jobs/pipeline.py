"""`python -m jobs.pipeline` in a checkout: what `python -m arm_ray.jobs.pipeline` is anywhere."""

import sys

from arm_ray.jobs.pipeline import main

if __name__ == "__main__":
    sys.exit(main())
