"""`megdet link-check` on two nodes. It needs root, and a kernel with netem or /dev/net/tun."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from megdet_hpc.errors import UserError
from megdet_hpc.link_check.__main__ import main
from megdet_hpc.link_check.nodes import LinkedNodes, command_relay, missing
from megdet_hpc.parallel.local_launch import mpirun_words
from tests.conftest import environment, run

FAULT = missing()
needs_nodes = pytest.mark.skipif(FAULT is not None, reason=f"link-check {FAULT}")


def spaces() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout


@needs_nodes
def test_a_link_delays_and_limits_what_a_node_sends(tmp_path: Path) -> None:
    """A connection takes a way there and back; 4 MB at 8 MB/s take half a second."""
    server = tmp_path / "server.py"
    server.write_text(
        "import socket\ns = socket.create_server(('10.231.77.2', 7000))\nprint('up', flush=True)\n"
        "for _ in range(2):\n    c, _a = s.accept()\n    n = 0\n"
        "    while b := c.recv(1 << 20):\n        n += len(b)\n    c.sendall(str(n).encode())\n    c.close()\n"
    )
    client = tmp_path / "client.py"
    client.write_text(
        "import socket, sys, time\nb = time.perf_counter()\nc = socket.create_connection(('10.231.77.2', 7000))\n"
        "up = time.perf_counter() - b\nc.sendall(bytes(int(sys.argv[1])))\nc.shutdown(socket.SHUT_WR)\n"
        "n = int(c.recv(100))\nprint(n, up, time.perf_counter() - b)\n"
    )
    with LinkedNodes(2) as nodes:
        assert "mdl-" in spaces()
        nodes.set_links(0.02, 8e6)
        with subprocess.Popen([*nodes.on("node1"), "python3", str(server)], stdout=subprocess.PIPE) as serving:
            assert serving.stdout and serving.stdout.readline() == b"up\n"
            found = []
            for size in (1000, 4_000_000):
                shown = subprocess.run(
                    [*nodes.on("node0"), "python3", str(client), str(size)], capture_output=True, text=True, check=True
                ).stdout.split()
                assert int(shown[0]) == size
                found.append((float(shown[1]), float(shown[2])))
        (connected, short), (_, long) = found
        assert connected > 0.04 and short > 0.08  # one way there and back, then another for the data
        assert long - short > 0.8 * 4e6 / 8e6
    assert "mdl-" not in spaces()


# as a user has it: Open MPI refuses root without a word
ROOTLESS = ("-u", "OMPI_ALLOW_RUN_AS_ROOT", "-u", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")


@needs_nodes
@pytest.mark.parallel
@pytest.mark.skipif(len(mpirun_words(environment()["PATH"])) < 2, reason="link-check starts its ranks by Open MPI")
def test_real_steps_beside_predicted_ones(tmp_path: Path) -> None:
    """40 messages of 20 ms are in the plan's time, and no real step is quicker. How close they are needs idle cores."""
    file = tmp_path / "rows.json"
    command = "-m megdet_hpc link-check --exchanges packed --delays-ms 20 --rates-gbps 1 --seconds 2 --side 64"
    options = ["--images-per-rank", "1", "--solver.gradients", "mpi", "--json", str(file)]
    done = run(["env", *ROOTLESS, "python", *command.split(), *options], timeout=150)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(file.read_text())["rows"]
    assert row["predicted"]["cgbn"] >= 40 * 0.02
    assert row["quickest"] > 40 * 0.02 + row["predicted"]["gradients"] / 2
    assert -0.9 < row["error"] < 2 and row["steps"] >= 3
    error = abs(row["error"])
    assert f"error: median {error:.1%}, most {error:.1%}; {int(error < 0.15)} of 1 below 15%" in done.stdout
    assert "mdl-" not in spaces()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "1"], "--nodes 1; accepted: 2 or more"),
        (["--delays-ms", "-1"], "--delays-ms -1; accepted: 0 or more"),
        (["--rates-gbps", "0"], "--rates-gbps 0; accepted: more than 0"),
    ],
)
def test_what_cannot_be_ends_with_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_who_is_not_root_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(UserError, match="needs root, to make network namespaces"):
        LinkedNodes(2)


def test_a_relay_that_has_ended_is_said() -> None:
    """It may end before it is told a rate, or before it answers."""
    for code in ("raise SystemExit(3)", "import sys; sys.stdin.readline(); raise SystemExit(3)"):
        with subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as relay:
            if "readline" not in code:
                relay.wait()
            with pytest.raises(UserError, match="the relay between the nodes ended with status 3"):
                command_relay(relay, 0.0, 0.0)
            assert relay.stdin
            with suppress(BrokenPipeError):
                relay.stdin.close()
