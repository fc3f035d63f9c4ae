"""For `ray job submit --working-dir .` in a checkout: the jobs of `arm_ray.jobs`."""
