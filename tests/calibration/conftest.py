"""Ray, and a tiny tokenizer, for the calibration tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from calibration_helpers import save_tokenizer


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        # arm_ray may not be installed, only importable from here.
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parents[2])}},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
