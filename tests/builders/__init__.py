"""What tests are given and what they compare: nothing here is a test."""

import pytest

# Its assertions say what they found, as those of test modules do.
pytest.register_assert_rewrite("tests.builders.checkpoints")
