"""`ray job submit … -- python -m jobs.study STUDY.yaml [section.key=value …]`."""

import sys

from arm_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["study", *sys.argv[1:]]))
