"""What a pickle would make, found out without making it.

The interpreter in C is several times faster than the one in Python, and trusts what it reads: six
bytes may ask for a table of 2^32 places, and one byte makes a set of 200. So a pickle is gone
through by its instructions alone, and is refused where it asks for more than it can have to say.
"""

from __future__ import annotations

import mmap
import re

# Bytes of an instruction's argument -> the instructions that have one of this length.
_FIXED = {
    0: b"0(12tel}]NQRabsoud)\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94",
    1: b"Khq\x80\x82",
    2: b"M\x83",
    4: b"Jj\x84",
    8: b"G\x95",
}
# Bytes that say how many follow -> the instructions that have them.
_COUNTED = {
    code: size
    for size, codes in {1: b"\x8cCU\x8a", 4: b"XBT\x8b", 8: b"\x8d\x8e"}.items()
    for code in codes
}
_IN_RUNS = frozenset(b"".join(_FIXED.values()))
# Instructions whose arguments are lines -> how many.
_LINES = {**dict.fromkeys(b"SVFILPgp", 1), **dict.fromkeys(b"ci", 2)}
_LONG_PUT, _PUT, _STOP = b"rp."
# Instructions that make something of few bytes -> about how many bytes that takes.
_MADE = {
    **dict.fromkeys((b"\x8f", b"\x91"), 232),
    **dict.fromkeys((b"}", b"d", b"]", b"l", b"t", b"\x85", b"\x86", b"\x87"), 80),
    **dict.fromkeys((b"\x81", b"\x92", b"R", b"o"), 100),
}
# Bytes that may be made of each byte of a pickle; the tables of trainers come to 11. A small one
# may make more, which is still little.
_GROWTH, _ALWAYS = 24, 1 << 26
_PLACE_BYTES = 16
# Bytes whose instructions are counted at a time.
_PIECE = 1 << 20


def _one_of(codes: bytes) -> bytes:
    return b"[" + b"".join(re.escape(bytes([code])) for code in codes) + b"]"


# Instructions of fixed length, many at a time; of those that keep something at a place, the ones
# with a place below 2^22. The most are bounded, as the library keeps notes about each.
_RUN = re.compile(
    b"(?:"
    + b"|".join(
        [
            _one_of(_FIXED[0]) + b"+",
            *(_one_of(_FIXED[size]) + b".{%d}" % size for size in (1, 2, 4, 8)),
            rb"r..[\x00-\x3f]\x00",
        ]
    )
    + b"){1,1000}",
    re.DOTALL,
)


def check_pickle(data: bytes | mmap.mmap) -> None:
    """Refuse a pickle that would take much more memory than it has bytes.

    Args:
        data: It, and whatever comes after its end.

    Raises:
        ValueError: It would, is cut off, or has instructions that no table of a trainer has.
    """
    most = max(_ALWAYS, _GROWTH * len(data))
    made, pieces, num_bytes = 0, list[bytes](), 0
    position = 0
    while True:
        run = _RUN.match(data, position)
        if run is not None:
            position = run.end()
            pieces.append(run[0])
            num_bytes += len(pieces[-1])
            if num_bytes > _PIECE:
                made += _made_by(b"".join(pieces))
                pieces, num_bytes = [], 0
                _check_made(made, most)
            # The run may have ended at its bound.
            if position < len(data) and data[position] in _IN_RUNS:
                continue
        if position >= len(data):
            raise ValueError("it ends in the middle")
        code = data[position]
        if code == _STOP:
            _check_made(made + _made_by(b"".join(pieces)), most)
            return
        position = _after(data, position, code, most)


def _after(data: bytes | mmap.mmap, position: int, code: int, most: int) -> int:
    """Where the instruction after one of another kind begins."""
    begin = position + 1
    if code in _COUNTED:
        size = _COUNTED[code]
        end = begin + size + int.from_bytes(data[begin : begin + size], "little")
    elif code == _LONG_PUT:
        end = begin + 4
        _check_place(int.from_bytes(data[begin:end], "little"), most)
    elif code in _LINES:
        end = begin
        for _ in range(_LINES[code]):
            end = data.find(b"\n", end) + 1
            if end == 0:
                raise ValueError("it ends in the middle")
        if code == _PUT:
            _check_place(int(data[begin:end]), most)
    else:
        raise ValueError(f"the instruction {code:#x} at byte {position}, which no table has")
    if end > len(data):
        raise ValueError("it ends in the middle")
    return end


def _check_place(place: int, most: int) -> None:
    """Everything up to the last place that something is kept at takes room."""
    if place * _PLACE_BYTES > most:
        raise ValueError(f"it keeps something at place {place}, which is beyond its end")


def _made_by(run: bytes) -> int:
    """Bytes that instructions make, at most: those of their arguments are taken for more."""
    return sum(run.count(code) * num_bytes for code, num_bytes in _MADE.items())


def _check_made(made: int, most: int) -> None:
    if made > most:
        raise ValueError(f"it would make more than {most} bytes")
