"""The harnesses with bytes that hypothesis makes: mutations of whole inputs, and any bytes."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.harnesses import HARNESSES
from tests.waiting import no_hang

# Pieces that formats give a meaning to.
_PIECES = st.sampled_from(
    [
        *(b"[", b"]", b"{", b"}", b'"', b":", b",", b"-", b"\n", b"&a ", b"*a", b"<<: ", b"!!"),
        *(b"../", b"/", b"NaN", b"1e999", b"9" * 40, b"null", b"true", b"\xff", b"\\ud800"),
        # Of pickles: calls, names, and what is kept.
        *(b"R", b"b", b"c", b"q\xff", b"r\xff\xff\xff\x7f", b"\x93", b"\x94", b"\x81", b"\x95"),
        b"\0",
    ]
) | st.binary(max_size=6)


@pytest.mark.parametrize("name", HARNESSES)
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_any_bytes(name: str, data: st.DataObject) -> None:
    harness = HARNESSES[name]
    content = data.draw(st.sampled_from(harness.seeds) | st.binary(max_size=200))
    for _ in range(data.draw(st.integers(0, 5))):
        place = data.draw(st.integers(0, len(content)))
        removed = data.draw(st.integers(0, 6))
        content = content[:place] + data.draw(_PIECES) + content[place + removed :]
    with no_hang():
        harness.run(content)


@pytest.mark.parametrize("name", HARNESSES)
def test_whole_inputs_are_read(name: str) -> None:
    for seed in HARNESSES[name].seeds:
        HARNESSES[name].run(seed)
