"""`ray job submit … -- python -m jobs.attach CONFIG.yaml [section.key=value …]`."""

import sys

from arm_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["attach", *sys.argv[1:]]))
