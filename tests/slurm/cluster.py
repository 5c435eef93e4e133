"""A real Slurm on this machine: munge, a controller and two node daemons in a scratch folder.

    python tests/slurm/cluster.py FOLDER     # start, print how to use it, stop at Ctrl-C

Nothing outside of the folder is written, and no systemd, cgroup or system-wide munge is needed; two
node daemons share one host because each has a name and a port of its own. Root only: Slurm starts
jobs for others.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("setpriv", "munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "sinfo")
NODES = ("n1", "n2")
SBIN = "/usr/sbin:/sbin"
_PORTS = (33000, 60000)

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
JobRequeue=1
KillWait=20
SlurmdTimeout=20
SlurmctldTimeout=30
MessageTimeout=10
InactiveLimit=0
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
{nodes}
PartitionName=main Nodes={names} Default=YES MaxTime=INFINITE State=UP GraceTime=0
"""


def missing() -> str | None:
    """Why Slurm cannot start here, with what to do about it; None if it can."""
    path = f"{os.environ.get('PATH', '')}:{SBIN}"
    lacking = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if lacking:
        return f"no {', '.join(lacking)}: run tests/slurm/install.sh as root (Debian, Ubuntu)"
    return None if os.geteuid() == 0 else "Slurm's daemons start jobs for others: run as root"


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on; they stay unused for the moment that the daemons need."""
    found: list[int] = []
    candidates = range(_PORTS[0] + os.getpid() % 20000, _PORTS[1])
    for port in candidates:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"no {count} free ports from {candidates.start} on")


class Cluster:
    """Controller and node daemons; use as a context manager.

    Args:
        folder: New or empty; takes settings, keys, state and logs. Short: it holds a socket.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self.environment = {
            key: value for key, value in os.environ.items() if not key.startswith("SLURM_")
        } | {"SLURM_CONF": str(self.conf), "PATH": f"{os.environ['PATH']}:{SBIN}"}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Cluster":
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        host = socket.gethostname().split(".")[0]
        port, *node_ports = free_ports(1 + len(NODES))
        nodes = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={own} "
            "CPUs=2 RealMemory=4000"
            for name, own in zip(NODES, node_ports, strict=True)
        ]
        self.conf.write_text(
            CONF.format(
                host=host,
                port=port,
                folder=self.folder,
                nodes="\n".join(nodes),
                names=",".join(NODES),
            )
        )
        (self.folder / "state").mkdir(exist_ok=True)
        try:
            self._start_all()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start_all(self) -> None:
        paths = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log"}
        options = [f"--{name}={self.folder}/munge.{end}" for name, end in paths.items()]
        seed = f"--seed-file={self.folder}/munge.seed"
        self._start("munged", ["munged", "--foreground", "--force", *options, seed])
        self.wait(lambda: (self.folder / "munge.socket").exists(), "munged's socket")
        self._start("slurmctld", ["slurmctld", "-D", "-c"])
        for name in NODES:
            self.start_node(name)
        self.wait_for_nodes()

    def _start(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                # Should this process be killed, no daemon is left.
                ["setpriv", "--pdeathsig", "KILL", *command],
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def start_node(self, name: str) -> None:
        """Start the daemon of one node."""
        self._start(name, ["slurmd", "-D", "-N", name])

    def kill_node(self, name: str) -> None:
        """A node dies: its daemon and all that runs there for jobs, at once."""
        daemon = self._daemons.pop(name)
        daemon.kill()
        daemon.wait()
        for pid in self._processes_of(name):
            self._kill(pid)

    def _processes_of(self, name: str) -> list[int]:
        """Step daemons of a node of this cluster, and the processes of jobs there."""
        found = []
        mark = f"SLURM_CONF={self.conf}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                variables = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue  # it has ended, or is the kernel's
            place = {v.partition(b"=")[2] for v in variables if v.startswith(b"SLURMD_NODENAME=")}
            if mark in variables and (not name or name.encode() in place):
                found.append(int(folder.name))
        return found

    @staticmethod
    def steps_of(job: str) -> list[int]:
        """Daemons of a job's steps."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                name = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if name.startswith(f"slurmstepd: [{job}.".encode()):
                found.append(int(folder.name))
        return found

    @staticmethod
    def _kill(pid: int) -> None:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def run(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """Output of one of Slurm's commands; `environment` is beside this process's.

        Raises:
            RuntimeError: It failed; the message holds what it said.
        """
        done = subprocess.run(
            command,
            env=self.environment | environment,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` knows of a job."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, ready: Callable[[], bool], what: str, *, timeout_s: float = 30.0) -> None:
        """Until `ready()` holds."""
        deadline = time.monotonic() + timeout_s
        while not ready():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {timeout_s:g} s for {what}; logs in {self.folder}")
            time.sleep(0.2)

    def wait_for_nodes(self) -> None:
        """Until every node has answered the controller."""
        up = {"idle", "mixed", "allocated", "completing"}

        def answered() -> bool:
            done = subprocess.run(
                ["sinfo", "--noheader", "--Node", "--format=%T"],
                env=self.environment,
                capture_output=True,
                text=True,
            )
            states = done.stdout.split()
            return done.returncode == 0 and len(states) == len(NODES) and up.issuperset(states)

        self.wait(answered, "the nodes", timeout_s=60)

    def __exit__(self, *_: object) -> None:
        for daemon in self._daemons.values():
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(timeout=5)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        # Steps outlive their node's daemon.
        for pid in self._processes_of(""):
            if pid != os.getpid():
                self._kill(pid)


def main() -> int:
    """Start a cluster to try things on."""
    if problem := missing():
        print(f"error: {problem}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Cluster(Path(sys.argv[1]).resolve()) as cluster:
        print(f"export SLURM_CONF={cluster.conf} PATH=$PATH:{SBIN}")
        print(cluster.run("sinfo"), flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
