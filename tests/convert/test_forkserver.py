"""Programs that a fork server runs: the same to whoever asks as processes of their own."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from convert import child
from convert.forkserver import WITHOUT_TORCHAO

Told = Callable[..., tuple[dict[str, Any] | None, str]]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    """``told(body, **request)``: what came of a program whose ``main(request, answer)`` has that body."""
    folder, programs = tmp_path_factory.mktemp("programs"), set[str]()

    def tell(body: str, *, forked: bool = True, **request: Any) -> tuple[dict[str, Any] | None, str]:
        name = f"program{len(list(folder.glob('program*.py')))}"
        text = f"import json, os, signal, sys, time\nfrom pathlib import Path\ndef main(request, answer):\n    {body}\n"
        (folder / f"{name}.py").write_text(text + 'if __name__ == "__main__":\n    main(*sys.argv[1:])\n')
        programs.update([name] if forked else [])
        return child.run_program(name, request, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH")))))
        patch.setattr(child, "_server", child._Server())
        patch.setattr(child, "_FORKED", programs)
        yield tell
        child._server.end()


TELL = "{'request': json.loads(Path(request).read_text()), 'parent': os.getppid(), 'shared': 'torch' in sys.modules}"
ANSWER = f"Path(answer).write_text(json.dumps({TELL}))"


def test_a_program_finds_its_imports_and_each_is_a_process_of_its_own(told: Told) -> None:
    (one, said), (two, _) = told(ANSWER, number=1), told(ANSWER, number=2)
    assert one is not None, said
    assert two is not None
    assert (one["request"], two["request"]) == ({"number": 1}, {"number": 2})
    assert one["parent"] == two["parent"] != os.getpid()
    assert one["shared"]
    own, _ = told(ANSWER, forked=False)
    assert own is not None
    assert (own["parent"], own["shared"]) == (os.getpid(), False)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("print('on its way', flush=True); raise ValueError('so it is')", "on its way\nTraceback .*ValueError: so it is\n"),
        ("print('a word', file=sys.stderr); sys.exit(3)", "a word\n"),
        ("sys.exit('a word')", "a word\n"),
        ("os.system('echo from a child'); os.kill(os.getpid(), signal.SIGKILL)", "from a child\n\nit was killed by signal 9"),
        ("print('nothing is answered')", "nothing is answered\n"),
    ],
)
def test_how_a_program_fails_is_told_as_of_a_process_of_its_own(told: Told, body: str, said: str) -> None:
    for forked in (True, False):
        answer, output = told(body, forked=forked)
        assert answer is None
        assert re.fullmatch(said, output, re.DOTALL), output


def test_another_environment_begins_it_again_and_it_ends_with_whoever_asks(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = told(ANSWER)
    monkeypatch.setenv("OCTAVO_TEST", "seen")
    second, said = told("Path(answer).write_text(json.dumps({'parent': os.getppid(), 'seen': os.environ['OCTAVO_TEST']}))")
    assert first is not None
    assert second is not None, said
    assert second["seen"] == "seen"
    assert not Path(f"/proc/{first['parent']}").exists()
    assert len(list(Path(f"/proc/{second['parent']}/task").iterdir())) == 1, "a thread would hold behind a fork what it held before"
    server = child._server._process
    assert server is not None
    assert server.pid == second["parent"]
    assert server.stdin is not None
    server.stdin.close()
    assert server.wait(timeout=60) == 0


def test_without_its_server_a_program_is_run_all_the_same(told: Told) -> None:
    found, _ = told(ANSWER)
    assert found is not None
    os.kill(found["parent"], signal.SIGKILL)
    alone, said = told(ANSWER)
    assert alone is not None, said
    assert alone["parent"] == os.getpid()


def test_what_a_dead_server_leaves_behind_is_ended_before_it_is_run_again(told: Told, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    orphan = "time.sleep(1), os.kill(os.getppid(), signal.SIGKILL), time.sleep(600)"
    note = f"b = Path('{begun}'); first = not b.exists(); f = b.open('a'); f.write(f'{{os.getpid()}}\\n'); f.close()"
    answer, said = told(f"{note}; first and ({orphan}); Path(answer).write_text('{{}}')")
    assert answer == {}, said
    first, second = map(int, begun.read_text().split())
    assert first != second
    _has_ended(first)


@pytest.mark.parametrize("forked", [True, False])
def test_a_program_ends_with_whoever_asked_even_when_killed_with_its_server(forked: bool, told: Told, tmp_path: Path) -> None:
    """Also where it never looks whether anybody is there."""
    begun = tmp_path / "begun"
    body = f"Path('{begun}.new').write_text(str(os.getpid())); os.rename('{begun}.new', '{begun}'); time.sleep(600)"
    asking = os.fork()
    if asking == 0:
        told(body, forked=forked)
        os._exit(0)
    while not begun.exists():
        time.sleep(0.05)
    program = int(begun.read_text())
    above = int(re.search(r"PPid:\t(\d+)", Path(f"/proc/{program}/status").read_text()).group(1))  # type: ignore[union-attr]
    assert (above == asking) is not forked
    for pid in {above, asking}:
        os.kill(pid, signal.SIGKILL)
    os.waitpid(asking, 0)
    _has_ended(program)


@pytest.mark.gpu
def test_a_program_computes_on_a_gpu_behind_the_fork(told: Told) -> None:
    compute = "import torch; found = torch.ones(2, device='cuda').sum().item()"
    parents = set()
    for device in ("cuda", "cuda", "cpu"):
        answer, said = told(f"{compute}; Path(answer).write_text(json.dumps([found, os.getppid()]))", device=device)
        assert answer is not None, said
        assert answer[0] == 2
        parents.add(answer[1])
    assert len(parents) == 1
    assert os.getpid() not in parents


def test_where_no_gpu_survives_a_fork_programs_for_it_are_processes_of_their_own(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(child, "_server", child._Server())
    for _ in range(2):
        found, said = told(ANSWER, device="cuda")
        assert found is not None, said
        assert found["parent"] == os.getpid()
        assert not child._server.serves("cuda"), "it would be begun in vain again"
    found, _ = told(ANSWER)
    assert found is not None
    assert found["parent"] != os.getpid()
    child._server.end()


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_what_is_imported_beside_a_gpu_leaves_out_what_begins_it() -> None:
    imports = ", ".join(WITHOUT_TORCHAO)
    said = subprocess.check_output([sys.executable, "-c", f"import {imports}; import sys; print('torchao' in sys.modules)"], text=True)
    assert said == "False\n"
    beside = "import sys, transformers.modeling_utils; print('torchao' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", beside], text=True).endswith("True\n"), "no more reason for WITHOUT_TORCHAO"


def test_where_the_system_cannot_wait_for_two_things_no_server_is_begun(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pidfd_open")
    monkeypatch.setattr(child, "_server", child._Server())
    child.prepare("cpu")
    found, said = told(ANSWER)
    assert found is not None, said
    assert found["parent"] == os.getpid()
    assert child._server._process is None


def test_what_is_prepared_is_what_runs(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_server", child._Server())
    child.prepare("cpu")
    server = child._server._process
    assert server is not None
    found, said = told(ANSWER)
    assert found is not None, said
    assert found["parent"] == server.pid
    child._server.end()


def test_an_interruption_ends_the_program_and_its_server(told: Told, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    body = f"Path('{begun}.new').write_text(f'{{os.getpid()}} {{os.getppid()}}'); os.rename('{begun}.new', '{begun}'); time.sleep(600)"
    interrupted = threading.Event()

    def interrupt() -> None:
        while not begun.exists():
            time.sleep(0.01)
        interrupted.set()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        told(body)
    thread.join()
    assert interrupted.is_set()
    for pid in map(int, begun.read_text().split()):
        _has_ended(pid)


def test_a_program_ends_with_whoever_was_killed_while_it_ran(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    (tmp_path / "sleeper.py").write_text(
        f"import os, time\ndef main(*_):\n    open('{begun}.new', 'w').write(str(os.getpid()))\n    os.rename('{begun}.new', '{begun}')\n"
        "    time.sleep(600)\n"
    )
    asks = "from convert import child; child._FORKED = {'sleeper'}; child.run_program('sleeper', {}, __import__('pathlib').Path('.'))"
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    asking = subprocess.Popen([sys.executable, "-c", asks], cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths})
    deadline = time.monotonic() + 120
    while not begun.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    asking.kill()
    asking.wait()
    _has_ended(int(begun.read_text()))


def _has_ended(pid: int) -> None:
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
