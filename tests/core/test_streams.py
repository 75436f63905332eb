"""Standard streams that are closed, lose their reader, or lack a character take no command along;
Ctrl-C is one line."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEAD = "import os, sys\nfrom latentddae.core.errors import run_command\n"


def run(body: str, shell: str = "", **env: str) -> subprocess.CompletedProcess[bytes]:
    """A command with this `main`, started by a shell with redirections."""
    code = HEAD + f"def main(argv):\n {body}\nsys.exit(run_command('x', main, []))"
    line = f'"$PYTHON" -c "$CODE" {shell}'
    paths = {"PYTHON": sys.executable, "CODE": code, "PYTHONPATH": str(ROOT)}
    command = ["bash", "-c", f"set -o pipefail; {line}"]
    return subprocess.run(
        command, env={**os.environ, **paths, **env}, capture_output=True, timeout=60
    )


def test_a_reader_that_has_gone_ends_no_work(tmp_path) -> None:
    """`encode ... | head -1` encodes all splits."""
    done = tmp_path / "done"
    body = f"[print('x' * 999, flush=True) for _ in range(999)]; open({str(done)!r}, 'w')"
    result = run(body, "| head -c 1")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"x", b"")
    assert done.exists()


def test_closed_streams_are_no_files_of_others(tmp_path) -> None:
    """Without this the file would be number 1 or 2, and hold what libraries print."""
    file = tmp_path / "file"
    body = f"f = open({str(file)!r}, 'w'); print('lost'); os.write(1, b'1'); os.write(2, b'2')"
    assert run(body, "<&- >&- 2>&-").returncode == 0
    assert file.read_bytes() == b""


def test_characters_that_an_encoding_lacks_are_escaped() -> None:
    result = run(r"print('a\udcff é'); print('é', file=sys.stderr)", PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stdout) == (0, b"a\\udcff \\xe9\n")
    assert result.stderr == b"\\xe9\n"


def test_an_interrupt_is_one_line_and_130() -> None:
    result = run("import signal; os.kill(os.getpid(), signal.SIGINT); signal.pause()")
    assert (result.returncode, result.stderr) == (130, b"latentddae x: interrupted\n")
