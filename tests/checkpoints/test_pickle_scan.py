"""Pickles that ask for more than they say are told without being read."""

from __future__ import annotations

import collections
import io
import pickle
import struct
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arm_ray.checkpoints.pickle_scan import check_pickle

_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text(), inner)
        | st.tuples(inner, inner)
        | st.frozensets(st.integers())
        | st.sets(st.text())
    ),
    max_leaves=40,
)


@settings(max_examples=200, deadline=None)
@given(value=_VALUES, protocol=st.integers(0, pickle.HIGHEST_PROTOCOL), cut=st.integers(1, 50))
def test_what_pickle_writes_is_let_through(value: Any, protocol: int, cut: int) -> None:
    data = pickle.dumps(value, protocol)
    check_pickle(data)
    check_pickle(data + b"more")
    with pytest.raises(ValueError, match=r"ends in the middle|no table has"):
        check_pickle(data[: -min(cut, len(data))])


@pytest.mark.parametrize("protocol", [2, 4])
def test_classes_and_many_places_are_let_through(protocol: int) -> None:
    value = [
        (torch.Size([n, 1]), collections.OrderedDict(a=f"name {n}", b=n / 3, c=n << 20))
        for n in range(30_000)
    ]
    check_pickle(pickle.dumps(value, protocol))


_SOME = 1 << 23


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"\x80\x02Nr\xff\xff\xff\x7f.", "keeps something at place"),
        (b"Np4294967295\n.", "keeps something at place"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 50) + b"x.", "in the middle"),
        (b"\x80\x04X\xff\xff\xff\xffx.", "in the middle"),
        (b"\x80\x05\x96" + struct.pack("<Q", 1) + b"x.", "0x96 at byte 2, which no table"),
        (b"\x80\x04(" + b"\x8f" * _SOME + b"l.", "would make more than"),
        (b"\x80\x04(" + b"]" * _SOME + b"l.", "would make more than"),
        (b"\x80\x04N" + b"\x85" * _SOME + b".", "would make more than"),
        (b"", "in the middle"),
        (b"S'no end", "in the middle"),
    ],
)
def test_what_grows_or_ends_early_is_told(data: bytes, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        check_pickle(data)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=60).filter(lambda data: not {0x96, 0x97, 0x98} & set(data)))
def test_what_is_let_through_has_the_instructions_that_are_read(data: bytes) -> None:
    """Up to its end, a pickle is read in the steps that were looked at."""

    class Closed(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            raise pickle.UnpicklingError("a class")

    try:
        check_pickle(b"N0" + data)
    except ValueError:
        with pytest.raises(Exception):  # noqa: B017, PT011 -- a damaged pickle raises anything
            Closed(io.BytesIO(b"N0" + data)).load()
