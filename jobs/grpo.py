"""`python -m jobs.grpo` in a checkout: what `python -m arm_ray.jobs.grpo` is anywhere."""

import sys

from arm_ray.jobs.grpo import main

if __name__ == "__main__":
    sys.exit(main())
