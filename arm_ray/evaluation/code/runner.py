"""The first code that runs inside: it takes the program from a socket and runs it.

The host and this code talk over one socket:

1. ``H``: the interpreter has started. The answer is the program.
2. With tests only: ``T``: the program's own code has run. The answer is the tests.
3. ``K``: the tests have run to their end. The answer is a random token.
4. The token again, and the end.

So nothing that a program can look at while its own code runs (its arguments, environment, files,
standard input, frames, memory) holds the tests, and nothing that it can look at while the tests
run holds the token. The functions used at the end are kept from the start, against a program
that replaces them. What remains is in ``docs/sandbox.md``.

Without tests the program is ``__main__``. With tests it is a module named ``program``, as in the
harnesses of these benchmarks, where ``__name__`` is not ``__main__`` either.
"""

from __future__ import annotations

# The interpreter's own options: no site-packages, nothing of the user's, no bytecode. Instead of
# -I, which would ignore PYTHONHASHSEED: a fixed one gives a program the same verdict every time.
INTERPRETER_OPTIONS = ("-s", "-S", "-B", "-c")

TOKEN_BYTES = 32
FRAME_HEADER = 16

RUNNER = r"""
import builtins, os, sys, types

def start(fd, mode, packages, read=os.read, write=os.write, leave=os._exit,
          run=exec, build=compile):
    def take(size):
        parts = []
        while size:
            part = read(fd, size)
            if not part:
                leave(125)
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def source():
        return take(int(take(16))).decode("utf-8", "surrogatepass")

    os.set_inheritable(fd, False)
    # Without the site module these two are missing.
    builtins.exit = builtins.quit = sys.exit
    sys.path[:] = [*filter(None, sys.path), *packages]
    sys.argv[:] = ["program.py"]
    write(fd, b"H")
    text = source()
    if mode == "script":
        os.close(fd)
        return text
    module = types.ModuleType("program")
    sys.modules["program"] = module
    space = module.__dict__
    run(build(text, "program.py", "exec"), space)
    write(fd, b"T")
    run(build(source(), "tests.py", "exec"), space)
    try:
        sys.stdout.flush()
    except Exception:
        pass
    write(fd, b"K")
    write(fd, take(32))
    leave(0)

__text = start(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
del builtins, os, sys, types, start
exec(compile(globals().pop("__text"), "program.py", "exec"))
"""


def frame(text: str) -> bytes:
    """A program as it goes over the socket: its length in 16 digits, and its bytes."""
    data = text.encode("utf-8", "surrogatepass")
    return b"%016d" % len(data) + data
