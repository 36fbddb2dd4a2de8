"""Sweeps under fire: killed workers, killed sweeps, restarted servers; every trial has exactly one result."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from joblib.externals.loky import get_reusable_executor

from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.training.sweep.sweeps import Range, Sweep, Trial
from workbench.training.sweep.trial_ledger import Ledger, owner_name

#: Worker processes are forked from a clean process that has imported everything once.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["workbench.training.sweep.sweeps"])


def square(params: dict, trial: Trial) -> dict:
    return {"value": (params["x"] - 3) ** 2}


@dataclass(frozen=True)
class Logged:
    """An objective that leaves a line in the log when it has finished."""

    log: str
    pause: float

    def __call__(self, params: dict, trial: Trial) -> dict:
        time.sleep(self.pause)
        with open(self.log, "a") as file:
            file.write(f"{trial.number} {os.getpid()}\n")
        return square(params, trial) | {"pid": os.getpid()}


def work(url: str, log: str, count: int, pause: float, workers: int) -> None:
    """What a worker process does: it joins the sweep, in a session of its own so that it can be killed with
    those it starts.
    """
    os.setsid()
    Sweep("sweep", {"x": list(range(count))}, Logged(log, pause), storage=url).run(workers=workers)
    if workers > 1:
        get_reusable_executor().shutdown()  # a process of multiprocessing ends without the hooks that do this


def start(tmp_path: Path, url: str, count: int, pause: float = 0.05, workers: int = 1) -> BaseProcess:
    process = CONTEXT.Process(target=work, args=(url, str(tmp_path / "log"), count, pause, workers))
    process.start()
    return process


def kill(process: BaseProcess) -> None:
    process.kill()
    process.join()


def ended_well(process: BaseProcess) -> bool:
    process.join(180)
    return process.exitcode == 0


def lines(tmp_path: Path) -> list[int]:
    log = tmp_path / "log"
    return [int(line.split()[0]) for line in log.read_text().splitlines()] if log.exists() else []


def wait_for(condition, seconds: float = 90.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.02)


def sqlite(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'sweep.sqlite'}"


def results(url: str, count: int):
    return Sweep("sweep", {"x": list(range(count))}, square, storage=url).table()


def check(table, count: int, tmp_path: Path, killed: int) -> None:
    """Exactly one result each, all right; what ran twice is at most what was in flight when somebody was
    killed.
    """
    assert table.trial.tolist() == list(range(count)) and set(table.state) == {"done"}
    assert table.value.tolist() == [(x - 3) ** 2 for x in range(count)]
    repeats = sum(n - 1 for n in Counter(lines(tmp_path)).values())
    assert repeats <= killed and (table.attempts > 1).sum() <= 2 * killed + 1


def test_two_workers_one_killed_sqlite(tmp_path: Path) -> None:
    url = sqlite(tmp_path)
    first, second = start(tmp_path, url, 24), start(tmp_path, url, 24)
    wait_for(lambda: len(lines(tmp_path)) >= 5)
    kill(first)
    assert ended_well(second)
    check(results(url, 24), 24, tmp_path, killed=1)


def test_whole_sweep_killed_and_resumed(tmp_path: Path) -> None:
    """kill -9 of the driver and of its pool at once; a new run finishes the rest and repeats at most the two
    in flight.
    """
    url = sqlite(tmp_path)
    driver = start(tmp_path, url, 12, pause=0.2, workers=2)
    wait_for(lambda: len(lines(tmp_path)) >= 3)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.join()
    before = len(lines(tmp_path))
    assert before < 12
    again = start(tmp_path, url, 12, pause=0.01)
    assert ended_well(again)
    check(results(url, 12), 12, tmp_path, killed=2)


def test_pool_outlives_a_killed_worker(tmp_path: Path) -> None:
    url = sqlite(tmp_path)
    driver = start(tmp_path, url, 16, pause=0.2, workers=2)
    wait_for(lambda: len(lines(tmp_path)) >= 3)
    victim = int((tmp_path / "log").read_text().splitlines()[-1].split()[1])
    assert victim != driver.pid
    os.kill(victim, signal.SIGKILL)
    assert ended_well(driver)
    check(results(url, 16), 16, tmp_path, killed=2)


@pytest.fixture()
def postgres(tmp_path: Path) -> Iterator[tuple[str, object]]:
    """A private PostgreSQL on loopback, and a function that restarts it.
    It refuses to run as root, so root becomes nobody.
    """
    pytest.importorskip("psycopg", reason="psycopg is not installed (the cluster extra)")
    found = shutil.which("initdb") or next(
        iter(sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")))), None
    )
    if found is None:
        pytest.skip("PostgreSQL's server programs (initdb, pg_ctl) are not installed")
    binaries = Path(found).parent
    home = Path("/tmp") / f"workbench-postgres-{os.getpid()}"  # nobody cannot enter pytest's own folders
    home.mkdir()
    become: dict = {}
    if os.geteuid() == 0:
        import pwd

        user = pwd.getpwnam("nobody")
        os.chown(home, user.pw_uid, user.pw_gid)
        become = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def call(*command: str) -> None:
        done = subprocess.run(
            [str(binaries / command[0]), *command[1:]],
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            **become,
        )
        assert done.returncode == 0, done.stdout

    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={home} -c fsync=off"
    data = str(home / "data")
    try:
        call("initdb", "-D", data, "-U", "bench", "-A", "trust", "--no-sync")
        call("pg_ctl", "-D", data, "-l", str(home / "log"), "-o", options, "-w", "start")
        yield (
            f"postgresql+psycopg://bench@127.0.0.1:{port}/postgres",
            lambda: call(
                "pg_ctl",
                "-D",
                data,
                "-l",
                str(home / "log"),
                "-o",
                options,
                "-m",
                "immediate",
                "-w",
                "restart",
            ),
        )
    finally:
        subprocess.run(
            [str(binaries / "pg_ctl"), "-D", data, "-m", "immediate", "stop"],
            cwd="/",
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **become,
        )
        shutil.rmtree(home, ignore_errors=True)


def test_postgres_four_workers_kill_and_restart(postgres, tmp_path: Path) -> None:
    url, restart = postgres
    workers = [start(tmp_path, url, 40, pause=0.15) for _ in range(4)]
    wait_for(lambda: len(lines(tmp_path)) >= 6)
    kill(workers[0])
    wait_for(lambda: len(lines(tmp_path)) >= 14)
    restart()
    assert all(ended_well(worker) for worker in workers[1:])
    table = results(url, 40)
    check(table, 40, tmp_path, killed=5)  # the killed one, and at most four whose commit the restart cut off
    assert table.pid.nunique() >= 3


def test_dask_cluster(tmp_path: Path) -> None:
    distributed = pytest.importorskip("dask.distributed", reason="dask is not installed (the cluster extra)")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None
        ) as cluster,
        distributed.Client(cluster),
    ):
        table = Sweep("sweep", {"x": list(range(8))}, square, storage=sqlite(tmp_path)).run(
            workers=2, backend="dask"
        )
    assert table.value.tolist() == [(x - 3) ** 2 for x in range(8)] and set(table.state) == {"done"}


def test_a_claim_is_won_once(tmp_path: Path) -> None:
    """Eight threads race for 60 trials; a result without a claim is refused."""
    url = sqlite(tmp_path)
    sweep = Sweep("sweep", {"x": list(range(60))}, square, storage=url)
    sweep.open().close()
    won: list[int] = []

    def race() -> None:
        ledger = Ledger(url, "sweep")
        while (claim := ledger.claim(owner_name("race"))) is not None:
            won.append(claim.number)
            assert ledger.finish(claim.number, owner_name("race"), "done", {"value": 1.0}, 0.0)
            assert not ledger.finish(claim.number, owner_name("race"), "done", {"value": 2.0}, 0.0)

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == list(range(60)) and set(sweep.table().value) == {1.0}


def test_a_lost_claim_records_nothing(tmp_path: Path) -> None:
    ledger = Sweep("sweep", {"x": [1]}, square, storage=sqlite(tmp_path)).open()
    slow, quick = owner_name("slow"), owner_name("quick")
    assert ledger.claim(slow) is not None and ledger.claim(quick) is None
    ledger.release("slow")
    assert ledger.claim(quick) is not None
    assert (
        not ledger.beat(0, slow)
        and not ledger.finish(0, slow, "done", {"value": 0.0}, 0.0)
        and ledger.finish(0, quick, "done", {"value": 5.0}, 0.0)
    )


def test_divergence_and_errors_are_results(tmp_path: Path) -> None:
    def objective(params: dict, trial: Trial) -> dict:
        if params["x"] == 2:
            raise RuntimeError("no such luck")
        return {"value": float("inf") if params["x"] == 1 else 0.5}

    table = Sweep("sweep", {"x": [0, 1, 2]}, objective, storage=sqlite(tmp_path)).run(workers=1)
    assert table.state.tolist() == ["done", "done", "failed"] and table.diverged.tolist() == [
        False,
        True,
        False,
    ]
    assert table.error[2] == "RuntimeError: no such luck" and table.attempts[2] == 3


def test_stop_and_go_on(tmp_path: Path) -> None:
    progress = Progress()

    def objective(params: dict, trial: Trial) -> dict:
        if params["x"] == 3 and not (tmp_path / "asked").exists():
            (tmp_path / "asked").touch()
            progress.stop.set()
            assert trial.progress.stopped  # the run in flight sees it and its half result is thrown away
        return {"value": 0.0}

    sweep = Sweep("sweep", {"x": list(range(6))}, objective, storage=sqlite(tmp_path))
    assert sweep.run(workers=1, progress=progress).state.tolist() == ["done"] * 3 + ["waiting"] * 3
    assert sweep.run(workers=1).state.tolist() == ["done"] * 6


@pytest.mark.parametrize("sampling", ["random", "tpe"])
def test_sampling(tmp_path: Path, sampling: str) -> None:
    space = {"x": Range(1e-3, 10.0, log=True), "kind": ["a", "b"]}

    def objective(params: dict, trial: Trial) -> dict:
        return {"value": abs(params["x"] - 0.5) + (params["kind"] == "a")}

    sweep = Sweep("sweep", space, objective, sampling=sampling, trials=20, storage=sqlite(tmp_path))
    table = sweep.run(workers=1)
    assert len(table) == 20 and table.x.between(1e-3, 10).all() and table.x.nunique() == 20
    again = Sweep("other", space, objective, sampling=sampling, trials=20, storage=sqlite(tmp_path)).run(
        workers=1
    )
    if sampling == "random":
        assert again.x.tolist() == table.x.tolist()
    study = sweep._optuna(sweep.open().spec()[1])
    assert study.best_value == pytest.approx(table.value.min()) and len(study.trials) == 20


def test_halving_ends_bad_runs_early(tmp_path: Path) -> None:
    def objective(params: dict, trial: Trial) -> dict:
        for step in range(1, 17):
            if trial.report(params["x"], step):
                return {"value": params["x"], "steps": step}
        return {"value": params["x"], "steps": 16}

    table = Sweep(
        "sweep",
        {"x": Range(0.0, 1.0)},
        objective,
        sampling="random",
        trials=24,
        halving=True,
        storage=sqlite(tmp_path),
    ).run(workers=1)
    assert table.steps.min() < 16 and table.loc[table.value.idxmin(), "steps"] == 16


def test_another_sweep_under_the_same_name_is_refused(tmp_path: Path) -> None:
    Sweep("sweep", {"x": [1, 2]}, square, storage=sqlite(tmp_path)).open()
    with pytest.raises(BadInput, match="is a different sweep"):
        Sweep("sweep", {"x": [1, 3]}, square, storage=sqlite(tmp_path)).run(workers=1)
    with pytest.raises(BadInput, match="needs a number of trials"):
        Sweep("sweep", {"x": [1]}, square, sampling="random")
    with pytest.raises(BadInput, match="at least one value"):
        Sweep("sweep", {"x": []}, square)
