"""Machines on one machine: network namespaces with addresses of their own, each with a disk of its own if it is to.

A host is a network namespace, joined to a bridge by a pair of virtual interfaces. What runs there sees its own
interfaces alone, and a link can be cut. That takes root, and `ip netns`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

INTERFACE = "eth0"  # of every host


class Host(NamedTuple):
    """A network namespace, its address, and the folder in which its commands run."""

    name: str
    address: str
    folder: Path

    def start(self, command: Sequence[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
        """Starts a command there, in a session of its own; what it prints goes to a file."""
        variables = {"GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1", **environment}
        with open(log, "wb") as shown:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                cwd=self.folder,
                env={**os.environ, **variables},
                stdout=shown,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def link(self, state: str) -> None:
        """`down` takes the host from the network. Nothing tells the others, as when its cable is drawn. `up` again."""
        _ip("-n", self.name, "link", "set", INTERFACE, state)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextmanager
def hosts(count: int, folder: Path) -> Iterator[list[Host]]:
    """So many hosts that reach one another, each with a folder of its own inside this one, its working directory.

    The test is skipped, with the reason, where that is not permitted.
    """
    name, network = f"cmdp{os.getpid() % 100_000}", f"10.{os.getpid() % 200 + 20}.7"
    made = []
    with ExitStack() as undo:
        try:
            bridge = f"{name}-net"
            _ip("netns", "add", bridge)
            undo.callback(_ip, "netns", "del", bridge)
            _ip("-n", bridge, "link", "add", "bridge0", "type", "bridge")
            _ip("-n", bridge, "link", "set", "bridge0", "up")
            for number in range(1, count + 1):
                host = Host(f"{name}-{number}", f"{network}.{number}", folder / f"host{number}")
                host.folder.mkdir()
                _ip("netns", "add", host.name)
                undo.callback(_ip, "netns", "del", host.name)  # its interfaces go with it
                _ip(
                    "-n",
                    host.name,
                    "link",
                    "add",
                    INTERFACE,
                    "type",
                    "veth",
                    "peer",
                    "name",
                    f"p{number}",
                    "netns",
                    bridge,
                )
                _ip("-n", bridge, "link", "set", f"p{number}", "master", "bridge0", "up")
                _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", INTERFACE)
                _ip("-n", host.name, "link", "set", INTERFACE, "up")
                _ip("-n", host.name, "link", "set", "lo", "up")
                made.append(host)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = (getattr(error, "stderr", "") or str(error)).strip()
            pytest.skip(f"no network namespaces here: {reason}")
        yield made


def accelerate(host: Host, hosts: Sequence[Host], config: Path, module: str, *arguments: str) -> list[str]:
    """The command of a host, one process on each, by accelerate's launcher."""
    return [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)),
        *("--num_machines", str(len(hosts)), "--num_processes", str(len(hosts))),
        *("--machine_rank", str(hosts.index(host)), "--main_process_ip", hosts[0].address),
        *("--main_process_port", "29500", "-m", module, *arguments),
    ]


def torchrun(host: Host, hosts: Sequence[Host], module: str, *arguments: str) -> list[str]:
    """The same by torchrun."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(hosts)), "--nproc_per_node", "1"),
        *("--node_rank", str(hosts.index(host)), "--master_addr", hosts[0].address, "--master_port", "29500"),
        *("-m", module, *arguments),
    ]
