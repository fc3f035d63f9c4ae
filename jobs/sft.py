"""`python -m jobs.sft` in a checkout: what `python -m arm_ray.jobs.sft` is anywhere."""

import sys

from arm_ray.jobs.sft import main

if __name__ == "__main__":
    sys.exit(main())
