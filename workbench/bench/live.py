"""What three open, live pages cost a running stream: p99 inter-token latency with them ÷ without them. Bar: at most 1.3.

One server process, one client, one browser, all on this machine. Rounds alternate: pages closed, pages open (Overview,
Playground and Engine in three visible windows), each long enough for several refreshes of every page. In each round the
client reads streams one after the other; the gaps between tokens are taken twice: where the engine committed them
(RequestRecord.token_ns) and where the client read them from its socket. Gaps of all rounds of a kind are pooled; the ratio
of each neighbouring pair of rounds shows the spread.

What can cost: the fragments' Python (it shares the interpreter with the engine thread), their messages, and the
browser's painting, which on a small machine takes the very cores that the engine computes on. A person's browser usually
runs on another machine: to come near to that, the browser gets only time that nobody else wants (`--browser-priority same`
leaves it as it is), and the output says so. CPU times of server and browser are printed beside the latencies.

A virtual machine's processors can be taken away from it (steal): a pair of rounds in which more than MAX_STOLEN of their time
was is measured again, at most RETRIES times as often as asked; then the quietest pairs count, and the output says so.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

BAR = 1.3
MAX_STOLEN = 0.02
RETRIES = 3
SETTLE_S = 5.0  # after which pages that were opened are as they will stay
PATHS = ("/", "/playground", "/engine")
PROMPT = "Tell me a story about a fox and a lamp."
WARM_UP_TOKENS = 64
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync")  # fmt: skip
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5, help="pairs of rounds, closed and open (default 5)")
    parser.add_argument(
        "--round-s", type=float, default=12.0, help="seconds of streaming a round (default 12)"
    )
    parser.add_argument("--tokens", type=int, default=1500, help="output tokens a stream (default 1500)")
    parser.add_argument(
        "--browser-priority",
        choices=("idle", "same"),
        default="idle",
        help="idle: the browser gets only time that nobody else wants; same: the server's priority (default idle)",
    )
    parser.add_argument(
        "--threads", type=int, default=None, help="CPU threads of the engine (default: its own choice)"
    )
    parser.add_argument("--model", default=None, help="folder or hub id (default: the bundled model)")
    parser.add_argument("--fake", action="store_true", help="no model: measures the pages against FakeRunner")
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("chromium-browser"))


@dataclass(slots=True)
class Gaps:
    """Inter-token gaps of one round, ms, and CPU seconds used meanwhile."""

    engine_ms: list[float] = field(default_factory=list)
    client_ms: list[float] = field(default_factory=list)
    wall_s: float = 0.0
    server_cpu_s: float = 0.0
    browser_cpu_s: float = 0.0
    stolen: float = 0.0  # share of the processors' time that the hypervisor took


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, return the figures. Exits with a sentence when there is no browser."""
    if args.chromium is None:
        raise SystemExit("no chromium found: apt install chromium, or name one with --chromium")
    with _server(args) as server, _browser(args) as browser:
        server.stream(WARM_UP_TOKENS)
        idle = _idle_cost(server, browser)
        pairs: list[dict[str, Gaps]] = []
        while len(pairs) < args.rounds * RETRIES and sum(map(_is_quiet, pairs)) < args.rounds:
            kinds = ("closed", "open") if len(pairs) % 2 == 0 else ("open", "closed")  # drift hits both alike
            pair: dict[str, Gaps] = {}
            for kind in kinds:
                browser.show(server.url if kind == "open" else None)
                pair[kind] = _round(server, browser, args)
            pairs.append(pair)
    used = sorted(pairs, key=_stolen)[: args.rounds]
    rounds = {kind: [pair[kind] for pair in used] for kind in ("closed", "open")}
    stolen = {
        "max_stolen": MAX_STOLEN,
        "pairs_measured": len(pairs),
        "stolen_by_pair": [round(_stolen(pair), 4) for pair in pairs],
        "is_quiet": all(map(_is_quiet, used)),
    }
    figures = _figures(rounds, args) | idle | stolen
    _print(figures, args)
    return figures


def _stolen(pair: dict[str, Gaps]) -> float:
    return max(gaps.stolen for gaps in pair.values())


def _is_quiet(pair: dict[str, Gaps]) -> bool:
    return _stolen(pair) <= MAX_STOLEN


def _round(server: Server, browser: Browser, args: argparse.Namespace) -> Gaps:
    gaps = Gaps()
    server.stream(WARM_UP_TOKENS)
    server.token_times()
    began, server_cpu, browser_cpu = time.monotonic(), server.cpu_s(), browser.cpu_s()
    stolen_s = _stolen_s()
    while time.monotonic() - began < args.round_s:
        gaps.client_ms += np.diff(server.stream(args.tokens)).tolist()
    gaps.wall_s = time.monotonic() - began
    gaps.stolen = (_stolen_s() - stolen_s) / gaps.wall_s / (os.cpu_count() or 1)
    gaps.server_cpu_s = server.cpu_s() - server_cpu
    gaps.browser_cpu_s = browser.cpu_s() - browser_cpu
    for times in server.token_times():
        gaps.engine_ms += (np.diff(np.asarray(times, np.int64)) / 1e6).tolist()
    return gaps


def _idle_cost(server: Server, browser: Browser, seconds: float = 8.0) -> dict[str, float]:
    """CPU of server and browser per second with the pages open and no request running, and with none open."""
    costs: dict[str, float] = {}
    for name, url in (("closed", None), ("open", server.url)):
        browser.show(url)
        before = server.cpu_s(), browser.cpu_s()
        time.sleep(seconds)
        costs[f"idle_server_cpu_ms_per_s_{name}"] = round(1000 * (server.cpu_s() - before[0]) / seconds, 1)
        costs[f"idle_browser_cpu_ms_per_s_{name}"] = round(1000 * (browser.cpu_s() - before[1]) / seconds, 1)
    return costs


def _figures(rounds: dict[str, list[Gaps]], args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {
        "bar": BAR,
        "rounds": args.rounds,
        "browser_priority": args.browser_priority,
        "fake": args.fake,
    }
    for side in ("engine", "client"):
        pooled = {kind: np.concatenate([getattr(g, f"{side}_ms") for g in rounds[kind]]) for kind in rounds}
        for kind, gaps in pooled.items():
            quantiles = np.percentile(gaps, (50, 90, 99, 99.9))
            found[f"{side}_{kind}_ms"] = {
                "n": len(gaps),
                **{f"p{q:g}": round(float(v), 3) for q, v in zip((50, 90, 99, 99.9), quantiles, strict=True)},
            }
        p99 = {k: [float(np.percentile(getattr(g, f"{side}_ms"), 99)) for g in rounds[k]] for k in rounds}
        pairs = [o / c for c, o in zip(p99["closed"], p99["open"], strict=True)]
        found[f"{side}_p99_ratio"] = round(
            float(np.percentile(pooled["open"], 99) / np.percentile(pooled["closed"], 99)), 3
        )
        found[f"{side}_p99_ratio_by_pair"] = [round(r, 3) for r in pairs]
        found[f"{side}_p99_ratio_median_of_pairs"] = round(float(np.median(pairs)), 3)
    for kind in rounds:
        for who in ("server", "browser"):
            spent = sum(getattr(g, f"{who}_cpu_s") for g in rounds[kind]) / sum(
                g.wall_s for g in rounds[kind]
            )
            found[f"{who}_cpu_ms_per_s_{kind}"] = round(1000 * spent, 1)
    found["passed"] = found["engine_p99_ratio"] <= BAR and found["client_p99_ratio"] <= BAR
    return found


def _print(figures: dict[str, Any], args: argparse.Namespace) -> None:
    print(f"{'gaps between tokens, ms':<26}{'n':>8}{'p50':>9}{'p90':>9}{'p99':>9}{'p99.9':>9}")
    for side in ("engine", "client"):
        for kind in ("closed", "open"):
            row = figures[f"{side}_{kind}_ms"]
            print(
                f"{side + ', pages ' + kind:<26}{row['n']:>8}"
                + "".join(f"{row[q]:>9.2f}" for q in ("p50", "p90", "p99", "p99.9"))
            )
    for side in ("engine", "client"):
        pairs = ", ".join(f"{r:.2f}" for r in figures[f"{side}_p99_ratio_by_pair"])
        print(
            f"p99 with pages ÷ without, {side}: {figures[f'{side}_p99_ratio']:.2f} (pairs of rounds: {pairs}); bar {BAR}"
        )
    for who in ("server", "browser"):
        print(
            f"{who} CPU, ms a second: streaming {figures[f'{who}_cpu_ms_per_s_closed']:.0f} closed, "
            f"{figures[f'{who}_cpu_ms_per_s_open']:.0f} open; idle {figures[f'idle_{who}_cpu_ms_per_s_closed']:.0f} closed, "
            f"{figures[f'idle_{who}_cpu_ms_per_s_open']:.0f} open"
        )
    measured, quiet = figures["pairs_measured"], "" if figures["is_quiet"] else ": NOT quiet enough to tell"
    shares = ", ".join(f"{share:.1%}" for share in figures["stolen_by_pair"])
    print(f"pairs of rounds measured: {measured}; processor time stolen in each: {shares}{quiet}")
    how = "in idle time" if args.browser_priority == "idle" else "with the server's priority"
    print(f"The browser ran on this machine, {how}. {'Passed' if figures['passed'] else 'NOT passed'}.")


class Server:
    """The app in its own process; it tells its requests' token times on demand."""

    def __init__(self, process: subprocess.Popen[str], port: int, args: argparse.Namespace) -> None:
        self._process = process
        self._port = port
        self._args = args
        self.url = f"http://127.0.0.1:{port}"
        self._model = json.loads(self._get("/v1/models"))["data"][0]["id"]

    def stream(self, num_tokens: int) -> list[float]:
        """Read one streamed answer; when each of its tokens was read, ms."""
        body = {"model": self._model, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": num_tokens,
                "temperature": 0.8, "seed": 1, "stream": True, "ignore_eos": True}  # fmt: skip
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        if answer.status != 200:
            raise SystemExit(
                f"the server answered {answer.status}: {answer.read().decode(errors='replace')[:300]}"
            )
        times: list[float] = []
        while line := answer.readline():
            if line.startswith(b"data: {") and b'"content":"' in line:
                times.append(time.perf_counter() * 1e3)
        connection.close()
        return times[1:]  # the first one carries the role, or comes with it

    def token_times(self) -> list[list[int]]:
        """When the engine committed each output token of the requests that ended since the last call, ns."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("token_times\n")
        self._process.stdin.flush()
        times: list[list[int]] = json.loads(self._process.stdout.readline())
        return times

    def cpu_s(self) -> float:
        return _cpu_s({self._process.pid})

    def _get(self, path: str) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        connection.request("GET", path)
        return connection.getresponse().read()


class Browser:
    """Three visible windows, on the pages or on nothing."""

    def __init__(self, pages: list[Any], root_pid: int) -> None:
        self._pages = pages
        self._root_pid = root_pid

    def show(self, url: str | None) -> None:
        """Open the three pages, wait until they are live; or none."""
        for page, path in zip(self._pages, PATHS, strict=True):
            page.goto(url + path if url else "about:blank", timeout=240_000)
        if url:
            for page in self._pages:
                page.wait_for_selector(".q-chip.ok[role=status], .q-chip.busy[role=status]", timeout=240_000)
            self._pages[2].wait_for_selector(".timeline canvas", timeout=240_000)
        time.sleep(SETTLE_S)

    def cpu_s(self) -> float:
        return _cpu_s(_descendants(self._root_pid) - {os.getpid()})


@contextmanager
def _server(args: argparse.Namespace) -> Iterator[Server]:
    port = _free_port()
    env = {**os.environ, "PORT": str(port), "MLFLOW_PORT": str(_free_port())}
    env |= {"QUIRE_FAKE": "true"} if args.fake else {}
    env |= {"QUIRE_MODEL": args.model} if args.model else {}
    env |= {"QUIRE_THREADS": str(args.threads)} if args.threads else {}
    with tempfile.TemporaryDirectory() as home:
        command = [sys.executable, "-m", "workbench.bench.live_server"]
        process = subprocess.Popen(
            command, env={**env, "HOME_DIR": home}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None
            first = process.stdout.readline().strip()
            if first != "ready":
                raise SystemExit(f"the server did not start: {first or 'it ended'}")
            yield Server(process, port, args)
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


@contextmanager
def _browser(args: argparse.Namespace) -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright  # a test tool: not needed by anything else here

    before = _descendants(os.getpid())
    with sync_playwright() as playwright:
        driver = min(_descendants(os.getpid()) - before)  # Playwright's own process, the browser's parent
        if args.browser_priority == "idle":
            _make_idle(driver)
        opened = playwright.chromium.launch(executable_path=args.chromium, args=list(FLAGS))
        pages = [opened.new_context(viewport={"width": 1360, "height": 1000}).new_page() for _ in PATHS]
        if args.browser_priority == "idle":
            for pid in _descendants(driver):
                _lower_session(pid)
        yield Browser(pages, driver)
        opened.close()


def _make_idle(pid: int) -> None:
    """Let a process and all that it will start run only where no other thread wants to: every thread, since each has its own."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setscheduler(int(thread.name), os.SCHED_IDLE, os.sched_param(0))


def _lower_session(pid: int) -> None:
    """The kernel weighs sessions before threads where it groups them: give the process's one, where it is not ours, the least."""
    session, ours = Path(f"/proc/{pid}/autogroup"), Path("/proc/self/autogroup")
    try:
        if session.read_text().split()[0] != ours.read_text().split()[0]:
            session.write_text("19")
    except (
        OSError,
        IndexError,
    ):  # no such file without groups; EPERM for some users: the threads' own priority stands
        pass


def _descendants(root: int) -> set[int]:
    """`root` and all processes below it."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = {root}
    while fresh := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= fresh
    return found


def _cpu_s(pids: set[int]) -> float:
    """User and system time of these processes so far."""
    total = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += int(fields[11]) + int(fields[12])
    return total * TICK_S


def _stolen_s() -> float:
    """Seconds that this machine's processors have been taken away from it, all together."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    except OSError:
        return 0.0
    return int(fields[8]) * TICK_S if len(fields) > 8 else 0.0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
