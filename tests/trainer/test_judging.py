"""A completion is hostile input: what it can do to the judges, to their process and to the training.

The judge here that scores what it evaluates is as good to a completion as a shell: what *that* cannot do, none can.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cmdp_fast.errors import InputError
from cmdp_fast.judging import pool
from cmdp_fast.judging.pool import IsolationError, Judges

EVALUATE = """
import os, time
def evaluate():
    seen = []
    def judge(text):
        seen.append(text)
        return eval(text, {"seen": seen, "os": os, "time": time})
    return judge
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The folder of the judging processes with a judge that evaluates what it is told."""
    folder = tmp_path_factory.mktemp("judging")
    for file in ("process.py", "isolation.py"):
        shutil.copy(pool.HERE / file, folder)
    (folder / "judges.py").write_text(EVALUATE)
    patch = pytest.MonkeyPatch()
    patch.setattr(pool, "HERE", folder)
    yield folder
    patch.undo()


@pytest.fixture(scope="module")
def evaluating(isolation, here):
    return Judges("--rewards evil", "evaluate", seconds=2.0)


def ask(judges: Judges, *texts: str) -> list[pool.Verdict]:
    return judges.ask([{"text": text} for text in texts])


# ------------------------------------------------------------------------------------------------ what it cannot do


def test_code_cannot_reach_files_network_processes_or_the_environment(evaluating, here, tmp_path, monkeypatch):
    secret, made = tmp_path / "secret", tmp_path / "made"
    secret.write_text("a token")
    monkeypatch.setenv("HF_TOKEN", "a token")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        imported = "__import__('{}')".format
        denied = {
            "read": f"len(open({str(secret)!r}).read())",
            "list": f"len(os.listdir({str(tmp_path)!r}))",
            "list the root": "len(os.listdir('/'))",
            "another process": f"len(open('/proc/{os.getpid()}/environ').read())",
            "its own": "len(open('/proc/self/environ').read())",
            "write": f"open({str(made)!r}, 'w').write('x')",
            "append": f"open({str(secret)!r}, 'a').write('x')",
            "truncate": f"os.truncate({str(secret)!r}, 0) or 1",
            "remove": f"os.remove({str(secret)!r}) or 1",
            "rename": f"os.rename({str(secret)!r}, {str(made)!r}) or 1",
            "empty what it may read": f"os.open({os.__file__!r}, os.O_RDONLY | os.O_TRUNC)",
            "folder": f"os.mkdir({str(made)!r}) or 1",
            "link": f"os.symlink('/etc', {str(made)!r}) or 1",
            "mode": f"os.chmod({str(secret)!r}, 0) or 1",
            "write where it may read": f"open({os.__file__!r}, 'a').write('') or 1",
            "connect": f"{imported('socket')}.create_connection({address!r}).fileno()",
            "datagram": f"{imported('socket')}.socket({imported('socket')}.AF_INET, 2).fileno()",
            "local socket": f"{imported('socket')}.socketpair()[0].fileno()",
            "signal": f"os.kill({os.getpid()}, 15) or 1",
            "signal by the kernel": f"{imported('fcntl')}.fcntl(3, 8, {os.getpid()}) or 1",  # F_SETOWN
            "fork": "os.fork()",
            "run": f"{imported('subprocess')}.call(['touch', {str(made)!r}])",
            "shell": f"1 + os.system('touch {made}')",
            "thread": f"{imported('threading')}.Thread(target=print).start() or 1",
            "shared memory": f"{imported('multiprocessing.shared_memory').replace(')', ', fromlist=[1])')}"
            ".SharedMemory(create=True, size=9).size",
            "limits": f"{imported('resource')}.setrlimit(9, (-1, -1)) or 1",
            "environment": "len(os.environ['HF_TOKEN'])",
        }
        verdicts = dict(zip(denied, ask(evaluating, *denied.values()), strict=True))
    allowed = {name: verdict.score for name, verdict in verdicts.items() if not verdict.failure}
    assert allowed in ({}, {"shell": 0.0}, {"shell": 1.0 + (127 << 8)})  # os.system tells of it: -1, or exit code 127
    assert secret.read_text() == "a token" and not made.exists()
    assert ask(
        evaluating, "len(set(os.environ) - {'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'})", "1 + 1"
    ) == [pool.Verdict(0.0), pool.Verdict(2.0)]


def test_an_import_that_starts_threads_is_possible(evaluating):
    assert ask(evaluating, "float(__import__('numpy').ones(3).sum())") == [pool.Verdict(3.0)]


def test_a_thousand_open_files(isolation, here):
    """A training has many: none of them, and no other's answer, is open in the process that judges."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] != resource.RLIM_INFINITY and before[1] < 2048:
        pytest.skip("this machine lets a process open fewer")
    resource.setrlimit(resource.RLIMIT_NOFILE, (2048, before[1]))
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        judges = Judges("--rewards evil", "evaluate", seconds=5.0)
        # What poll says of a number that is not open is POLLNVAL.
        polled = "(lambda p: (p.register(n), p.poll(0))[1])(__import__('select').poll())"
        opened = f"len([n for n in range(4, 2048) if ({polled} or [(0, 0)])[0][1] != 32])"
        assert ask(judges, opened, "4") == [pool.Verdict(0.0), pool.Verdict(4.0)]
    finally:
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_nothing_outlives_a_completion(evaluating):
    """Each is judged in a process of its own, which has seen no other."""
    for _ in range(2):
        assert ask(evaluating, "len(seen)", "seen.clear() or len(seen)") == [pool.Verdict(1.0), pool.Verdict(0.0)]


def test_every_way_to_give_no_answer(evaluating, caplog):
    """Of the ways to end none ends anything but itself, and the verdicts stay with their completions."""
    hostile = {
        "exit()": "SystemExit",
        "(_ for _ in ()).throw(SystemExit(0))": "SystemExit",
        "(_ for _ in ()).throw(KeyboardInterrupt)": "KeyboardInterrupt",
        "os._exit(0)": "ended with exit code 0",
        "os._exit(7)": "ended with exit code 7",
        "os.abort()": "killed by SIG",
        "__import__('ctypes').string_at(0)": "killed by SIGSEGV",
        "9**9**9**9": "no answer within 2 s",
        "time.sleep(1e6)": "no answer within 2 s",
        "os.close(3) or time.sleep(1e6)": "killed by SIGKILL",
        "len(bytearray(1 << 40))": "MemoryError",
        "[0] * (1 << 29) and 1": "MemoryError",
        "'A'": "scored A, which is no number",
        "float('nan')": "scored nan, which is no number",
        "object()": "TypeError",
        "(": "SyntaxError",
        "((" * 100_000: "",  # MemoryError or SyntaxError, as the version has it
        "1" * 100_000: "",
        "\ud800": "",
        "os.write(3, b'[' * 9999) and os._exit(0)": "the answer makes no sense",
        "os.write(3, b'x' * 60000) and os._exit(0)": "the answer makes no sense",
        "os.write(3, b'{\"error\": 1}') and os._exit(0)": "the answer makes no sense",
        "(_ for _ in ()).throw(ValueError('\\x1b[2J\\nfoo'))": "ValueError: ?[2J",
    }
    texts = [text for bad in hostile for text in (bad, "3")]
    with caplog.at_level(logging.WARNING):
        verdicts = ask(evaluating, *texts)
    assert verdicts[1::2] == [pool.Verdict(3.0)] * len(hostile)
    for (text, expected), verdict in zip(hostile.items(), verdicts[::2], strict=True):
        assert verdict.score is None and verdict.failure.startswith(expected) and verdict.failure, text[:50]
    assert "no verdict on 2 of 46 completions (no answer within 2 s)" in caplog.text
    assert "\x1b" not in caplog.text
    told = len(caplog.records)
    assert ask(evaluating, "9**9**9**9")[0].failure and len(caplog.records) == told  # each kind once


def test_an_honest_completion_is_not_late_for_its_neighbours(here, isolation):
    """Each of them closes its answer and goes on, and is waited for a little; the honest answer is there by then."""
    judges = Judges("--rewards evil", "evaluate", seconds=2.0)
    judges._connection.close()
    judges.workers = 16
    rude = "time.sleep(0.95) or os.close(3) or time.sleep(9)"
    assert ask(judges, "time.sleep(1) or 1", *[rude] * 15)[0] == pool.Verdict(1.0)
    assert ask(judges, "os.write(3, b'{\"score\": 2}') and time.sleep(9)") == [pool.Verdict(2.0)]  # its own alone


def test_the_process_of_the_judges_may_die(evaluating):
    """Killed from outside, as a machine short of memory does, it costs the verdicts that were asked for and no more."""
    process = evaluating._connection._process
    threading.Timer(0.5, process.kill).start()
    assert {v.failure for v in ask(evaluating, *["time.sleep(1.5)"] * 4)} == {
        "the process of the judges is lost: it has ended"
    }
    assert ask(evaluating, "4") == [pool.Verdict(4.0)]
    assert evaluating.ask([]) == []


def test_an_interrupt_leaves_no_answer_for_the_next_question(evaluating):
    main_thread = threading.main_thread().ident
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    threading.Timer(0.3, signal.pthread_kill, (main_thread, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        ask(evaluating, "time.sleep(1) or 5", "6")
    signal.signal(signal.SIGINT, before)
    assert ask(evaluating, "7", "8") == [pool.Verdict(7.0), pool.Verdict(8.0)]


def test_a_forked_process_has_judges_of_its_own(evaluating):
    pid = os.fork()
    if pid == 0:
        os._exit(0 if [v.score for v in ask(evaluating, "1", "2")] == [1.0, 2.0] else 1)
    assert [v.score for v in ask(evaluating, "3", "4")] == [3.0, 4.0]
    assert os.waitpid(pid, 0)[1] == 0


def test_nothing_is_left_of_a_killed_training(here):
    """Neither the process of the judges nor one that judges."""
    program = f"""
from pathlib import Path
from cmdp_fast.judging import pool
pool.HERE = Path({str(here)!r})
judges = pool.Judges("--rewards evil", "evaluate", seconds=600.0, isolated=False)
print(judges._connection._process.pid, flush=True)
judges.ask([{{"text": "print(os.getpid(), file=open({str(here / "pid")!r}, 'w'), flush=True) or time.sleep(600)"}}])
"""
    # Not isolated, and with a file that may be written: so that the process can say who it is.
    (here / "isolation.py").write_text(
        (pool.HERE / "isolation.py").read_text().replace("RLIMIT_FSIZE: 0", "RLIMIT_FSIZE: 99")
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as training:
        zygote = int(training.stdout.readline())
        while not (here / "pid").exists() or not (here / "pid").read_text():
            assert training.poll() is None
        judging = int((here / "pid").read_text())
        training.kill()
    for pid in (zygote, judging):
        for _ in range(1000):
            if not running(pid):
                break
            threading.Event().wait(0.01)
        assert not running(pid)


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ------------------------------------------------------------------------------------------------ where there is none


@pytest.mark.parametrize(
    "old, new, why",
    [
        (
            "    from landlock import",
            "    raise OSError('no Landlock here')\n    from landlock import",
            "no Landlock here",
        ),
        ("    rules.apply()", "    pass", "a process of it could read a file"),
        ("    return calls", "    return type('', (), {'load': lambda _: None})()", "open a socket, start a process"),
    ],
)
def test_without_isolation_nothing_is_judged(isolation, here, tmp_path, monkeypatch, old, new, why):
    """Where a part of it is missing, and where the kernel says that it is there and it is not."""
    shutil.copytree(here, tmp_path / "judging")
    file = tmp_path / "judging" / "isolation.py"
    changed = file.read_text().replace(old, new)
    assert changed != file.read_text()
    file.write_text(changed)
    monkeypatch.setattr(pool, "HERE", tmp_path / "judging")
    with pytest.raises(IsolationError, match=f"cannot be isolated.*{why}.*--insist runs it with limits"):
        Judges("--rewards evil", "evaluate", seconds=2.0, insist="--insist")
    limited = Judges("--rewards evil", "evaluate", seconds=2.0, isolated=False)
    assert ask(limited, "len(os.listdir('/')) > 0", "9**9**9**9") == [
        pool.Verdict(1.0),
        pool.Verdict(None, "no answer within 2 s"),
    ]


def test_a_judge_that_cannot_be_loaded(here, tmp_path, monkeypatch):
    shutil.copytree(here, tmp_path / "judging")
    (tmp_path / "judging" / "judges.py").write_text("def evaluate():\n    import no_such_package\n")
    monkeypatch.setattr(pool, "HERE", tmp_path / "judging")
    with pytest.raises(InputError, match=r"--rewards evil: the judge cannot be loaded: .*no_such_package"):
        Judges("--rewards evil", "evaluate", seconds=2.0)
