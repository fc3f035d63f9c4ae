"""What a run reports, and what a program finds around it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from arm_ray.errors import SandboxError
from arm_ray.evaluation.code import process, seccomp
from arm_ray.evaluation.code.backends import has_ended
from arm_ray.evaluation.code.limits import Limits, Outcome
from arm_ray.evaluation.code.pool import in_order
from arm_ray.evaluation.code.programs import Program
from arm_ray.evaluation.code.sandbox import Sandbox
from tests.builders.sandboxes import QUICK, processes_left, sandbox
from tests.waiting import is_met, wait_for

__all__ = ["sandbox"]
ROOT = Path(__file__).parent.parent.parent


def test_a_script_reads_real_standard_input_and_its_output_is_kept(sandbox: Sandbox) -> None:
    outcome = sandbox.run("print(input()[::-1])\nprint(open('/dev/stdin').read())", stdin="abc\nd")
    assert (outcome.status, outcome.stdout, outcome.exit_code) == ("passed", "cba\nabc\nd\n", 0)
    assert sandbox.isolation == "bubblewrap"
    assert sandbox.python_version.startswith("3.")


@pytest.mark.parametrize("stdin", ["é\n", "é\n".encode(), "\udcff", ""])
def test_standard_input_may_be_any_text_or_bytes(sandbox: Sandbox, stdin: str | bytes) -> None:
    data = stdin if isinstance(stdin, bytes) else stdin.encode("utf-8", "surrogatepass")
    outcome = sandbox.run("import sys; print(sys.stdin.buffer.read())", stdin=stdin)
    assert outcome.stdout == f"{data!r}\n"


def test_large_input_and_output_go_through(sandbox: Sandbox) -> None:
    text = "x" * 3_000_000
    outcome = sandbox.run(f"print(len({text!r})); print(input())", stdin=text)
    assert outcome.stdout == f"3000000\n{text}\n"


@pytest.mark.parametrize(
    ("program", "status", "detail"),
    [
        ("1 / 0", "failed", "ZeroDivisionError: division by zero"),
        ("def", "failed", "SyntaxError: invalid syntax"),
        ("exit(3)", "failed", "exit code 3"),
        ("raise SystemExit", "passed", "exit code 0"),
        ("quit()", "passed", "exit code 0"),
        ("input()", "failed", "EOFError: EOF when reading a line"),
        ("if __name__ == '__main__': raise KeyError(1)", "failed", "KeyError: 1"),
        ("import os; os.kill(os.getpid(), 11)", "failed", "ended by signal SIGSEGV"),
        ("x = bytearray(1 << 30)", "memory", "one process asked for more than 536870912 bytes"),
        ("", "passed", "exit code 0"),
    ],
)
def test_how_a_script_ends_is_told(
    sandbox: Sandbox, program: str, status: str, detail: str
) -> None:
    outcome = sandbox.run(program, limits=QUICK)
    assert (outcome.status, outcome.detail) == (status, detail)


def test_a_program_finds_an_empty_machine(sandbox: Sandbox) -> None:
    program = """
import os, sys
print(os.getcwd(), os.listdir("/tmp"), sorted(os.listdir("/")))
print([n for n in os.listdir("/proc") if n.isdigit() and int(n) > 9])
print(sorted(os.environ), sys.argv, sys.path, os.getuid() != 0)
"""
    lines = sandbox.run(program).stdout.splitlines()
    directory, _, root = lines[0].partition(" [] ")
    assert directory == "/tmp"
    allowed = {"bin", "dev", "lib", "lib32", "lib64", "libx32", "proc", "sbin", "tmp", "usr"}
    assert set(eval(root)) <= allowed
    assert lines[1] == "[]"
    assert "'PATH'" in lines[2]
    assert "ARM" not in lines[2]
    assert "['program.py'] ['/usr/lib" in lines[2]
    assert lines[2].endswith("True")


def test_the_same_program_orders_its_sets_the_same_way_each_time(sandbox: Sandbox) -> None:
    program = "print(list({'a', 'b', 'c', 'd', 'e', 'f', 'g'}))"
    assert len({sandbox.run(program).stdout for _ in range(4)}) == 1


def test_ordinary_ways_to_have_more_processes_work(sandbox: Sandbox) -> None:
    program = """
import asyncio, multiprocessing, subprocess, threading
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(pool.map(abs, [-1, -2]))
print(subprocess.run(["echo", "x"], capture_output=True).stdout)
thread = threading.Thread(target=print, args=("thread",))
thread.start()
thread.join()
asyncio.run(asyncio.sleep(0))
"""
    assert sandbox.run(program).stdout == "[1, 2]\nb'x\\n'\nthread\n"


def test_tests_see_the_program_and_decide(sandbox: Sandbox) -> None:
    code = (
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\ndef f(): return A(1)"
    )
    assert sandbox.run_tests(Program(code, "assert f() == A(1)")).status == "passed"
    outcome = sandbox.run_tests(Program(code, "assert f() == A(2), 'no'"))
    assert (outcome.status, outcome.detail) == ("failed", "AssertionError: no")


def test_with_tests_the_program_is_not_main_as_in_the_benchmarks_harnesses(
    sandbox: Sandbox,
) -> None:
    code = "if __name__ == '__main__':\n    raise SystemExit(1)\nx = 1"
    assert sandbox.run_tests(Program(code, "assert x == 1")).status == "passed"


def test_a_program_that_ends_before_its_last_word_is_read_has_passed(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(program: subprocess.Popen[bytes]) -> bool:
        time.sleep(0.05)
        return has_ended(program)

    monkeypatch.setattr(process, "has_ended", late)
    for _ in range(3):
        assert sandbox.run_tests(Program("x = 1", "assert x == 1")).passed
        assert sandbox.run_tests(Program("import os; os._exit(0)", "")).status == "failed"


def test_what_a_program_prints_or_leaves_running_does_not_change_a_pass(sandbox: Sandbox) -> None:
    code = """
import threading, time, os, sys
threading.Thread(target=time.sleep, args=(60,)).start()
print("ok")
sys.stdout.close()
os.close(2)
"""
    outcome = sandbox.run_tests(Program(code, "assert True", QUICK))
    assert (outcome.status, outcome.stdout) == ("passed", "ok\n")
    assert outcome.seconds < 1.5


def test_a_program_has_the_clock_to_itself_from_its_start(sandbox: Sandbox) -> None:
    outcome = sandbox.run("import time; time.sleep(0.3)")
    assert 0.3 <= outcome.seconds < 2.0


def test_programs_side_by_side_have_users_of_their_own(sandbox: Sandbox) -> None:
    program = "import os, time; time.sleep(0.3); print(os.getuid())"
    outcomes: list[Outcome] = list(in_order(lambda _: sandbox.run(program), range(6), 4))
    uids = {outcome.stdout for outcome in outcomes}
    assert len(uids) == (2 if os.getuid() == 0 else 1)


def test_no_more_programs_than_slots_run_at_once(sandbox: Sandbox) -> None:
    begun = time.monotonic()
    list(in_order(lambda _: sandbox.run("import time; time.sleep(0.4)"), range(4), 4))
    assert time.monotonic() - begun >= 0.8


@pytest.mark.skipif(os.getuid() != 0, reason="another user has no choice of user ids")
def test_two_sandboxes_take_different_users(sandbox: Sandbox) -> None:
    with Sandbox.open(slots=1) as other:
        assert not set(other._users.uids) & set(sandbox._users.uids)


def test_results_come_in_order_and_little_is_taken_ahead() -> None:
    taken: list[int] = []
    lock = threading.Lock()

    def items() -> object:
        for index in range(50):
            with lock:
                taken.append(index)
            yield index

    results = in_order(lambda x: x * x, items(), workers=2)  # type: ignore[arg-type]
    assert next(results) == 0
    assert len(taken) <= 6
    assert list(results) == [x * x for x in range(1, 50)]


def test_an_error_of_one_item_ends_the_series() -> None:
    def fail(item: int) -> int:
        if item == 3:
            raise KeyError(item)
        return item

    with pytest.raises(KeyError):
        list(in_order(fail, range(10), 2))


def test_limits_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="wall_s is 0"):
        Limits(wall_s=0)


def test_packages_can_be_given_to_programs(sandbox: Sandbox, tmp_path: Path) -> None:
    assert sandbox.isolation == "bubblewrap"
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "greeting.py").write_text("WORD = 'hello'\n")
    with Sandbox.open(slots=1, packages=[str(packages)]) as other:
        assert other.run("import greeting; print(greeting.WORD)").stdout == "hello\n"
        assert not other.run(f"open({str(packages / 'x')!r}, 'w')").passed
    with pytest.raises(SandboxError, match="is not there"):
        Sandbox.open(packages=[str(tmp_path / "missing")])


def test_the_filter_is_known_for_the_machines_that_vllm_runs_on() -> None:
    for machine in ("x86_64", "aarch64"):
        program = seccomp.filter_program(machine)
        assert program is not None
        assert len(program) % 8 == 0
    assert seccomp.filter_program("s390x") is None


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become another user")
def test_it_isolates_as_an_ordinary_user_too(sandbox: Sandbox) -> None:
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from arm_ray.evaluation.code.sandbox import Sandbox
with Sandbox.open(slots=1, bubblewrap={sandbox._backend.executable!r}) as sandbox:  # type: ignore
    print(sandbox.isolation, sandbox.run("import os; print(os.getuid())").stdout)
    print(sandbox.run("open('/x', 'w')").detail)
    print(sandbox.run("open('/dev/x', 'w')").detail)
"""
    as_user = ["setpriv", "--reuid=60950", "--regid=60950", "--clear-groups"]
    module = ROOT / "arm_ray" / "errors.py"
    readable = subprocess.run([*as_user, "test", "-r", str(module)], check=False).returncode == 0
    if not readable:
        pytest.skip("the checkout is not readable for other users")
    command = [*as_user, "/usr/bin/python3", "-B", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[:4] == [
        "bubblewrap 60950",
        "",
        "OSError: [Errno 30] Read-only file system: '/x'",
        "OSError: [Errno 30] Read-only file system: '/dev/x'",
    ], done.stderr


def test_this_room_needs_no_ray_torch_or_vllm() -> None:
    script = (
        "import sys\n"
        "from arm_ray.evaluation.code import check_references, livecodebench, pass_at_k\n"
        "print([n for n in ('ray', 'torch', 'vllm', 'numpy') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr


def test_a_run_that_is_interrupted_leaves_nothing(sandbox: Sandbox) -> None:
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from arm_ray.evaluation.code.sandbox import Sandbox
sandbox = Sandbox.open(slots=1)
print(*sandbox._users.uids, flush=True)
sandbox.run("import os, time; os.fork(); time.sleep(60)")
"""
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    uid = child.stdout.readline().strip()
    wait_for(lambda: uid == "None" or _processes_of(int(uid)) >= 2, "the program runs")
    child.kill()
    child.wait()
    child.stdout.close()
    if uid == "None":
        pytest.skip("an ordinary user's programs cannot be told from its other processes")
    assert is_met(lambda: _processes_of(int(uid)) == 0)
    assert processes_left(sandbox) == []


def _processes_of(uid: int) -> int:
    return sum(
        path.stat().st_uid == uid
        for path in Path("/proc").iterdir()
        if path.name.isdigit() and path.exists()
    )
