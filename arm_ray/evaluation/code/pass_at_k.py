"""The probability that one of k completions passes."""

from __future__ import annotations

from math import comb


def pass_at_k(n: int, c: int, k: int) -> float:
    """Estimates pass@k of one problem, without bias, from n completions of which c passed.

    It is the share of all choices of k out of the n that hold at least one that passed:
    ``1 - C(n - c, k) / C(n, k)``.

    Args:
        n: Completions.
        c: Those that passed.
        k: How many may be tried; at most n.

    Raises:
        ValueError: The numbers do not fit together.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} completions, {c} passed: 0 <= c <= n and 1 <= k <= n")
    return 1.0 - comb(n - c, k) / comb(n, k)
