"""What is read from outside, given any bytes: our error, or a sound result, and nothing else.

Each harness is a function of bytes. Hypothesis gives them to it in `test_fuzz.py`, as CI does; a
fuzzer that follows the coverage does so for longer, and needs `pip install -e '.[fuzz]'`::

    python -m tests.fuzz headers -max_total_time=60
    make fuzz
"""
