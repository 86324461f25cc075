"""Runs every check and test of the project, and stops what it started.

`tests/run` calls it once the system packages are there. Each step runs in a session of its own, so that whatever a step
leaves behind can be found, reported and killed without touching anybody else's processes; the RabbitMQ node and its port
mapper are private to one run, so several runs can share a machine. The last line is the sum over all test runs.
"""

import argparse
import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache"
PARTS = ("lint", "unit", "embedded", "rabbitmq", "nodes")
# What is worth a run now and then, but needs long or flags that are not stable.
EXTRAS = ("sanitizers",)
# Every cargo call that runs tests selects this, so that all of them agree on features and nothing is built twice.
TESTED = ["--workspace", "--exclude", "benches"]
# A guard against a hang, not a measure of speed: a cold build on two slow cores stays well below it.
STEP_LIMIT = 40 * 60
NODE_START_LIMIT = 120


class Stopped(Exception):
    """A signal asked this run to stop."""

    def __init__(self, number):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Failure(Exception):
    """Something that a person must mend before the tests can run; one line."""


# ---- processes ----


def die_with_parent():
    """Runs in the child: a runner that is killed outright takes its children along (Linux only)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def session_members(session):
    """The processes of one session, by asking the kernel about every process."""
    members = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError):
            # The name in parentheses may itself hold blanks and parentheses; what follows it is state, parent, group, session.
            fields = Path("/proc", entry, "stat").read_text().rsplit(")", 1)[1].split()
            if int(fields[3]) == session and fields[0] != "Z":
                members.append(int(entry))
    return members


def command_line(pid):
    with contextlib.suppress(OSError):
        return Path("/proc", str(pid), "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return "?"


def wait_gone(pids, seconds):
    """Gives processes that are on their way out the time to get there."""
    end = time.monotonic() + seconds
    for pid in pids:
        with contextlib.suppress(OSError):
            fd = os.pidfd_open(pid)
            try:
                poll = select.poll()
                poll.register(fd, select.POLLIN)
                poll.poll(max(0, end - time.monotonic()) * 1000)
            finally:
                os.close(fd)


def kill_session(session):
    """Kills what is left of a session; a process that forks meanwhile is met in the next round."""
    while members := session_members(session):
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_gone(members, 5)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---- RabbitMQ ----


class RabbitMQ:
    """A private node: its own name, ports, port mapper, home, data and logs, on the loopback interface alone."""

    def __init__(self):
        self.dir = CACHE / f"rabbitmq-{os.getpid()}"
        self.sessions = []

    def start(self):
        sbin = Path(os.environ.get("SWEEPEA_RABBITMQ_SBIN", "/usr/lib/rabbitmq/bin"))
        # Another program may take a port between our look and the node's bind.
        for attempt in range(3):
            try:
                return self.try_start(sbin)
            except Failure:
                self.stop()
                if attempt == 2:
                    raise

    def try_start(self, sbin):
        shutil.rmtree(self.dir, ignore_errors=True)
        self.dir.mkdir(parents=True)
        port, tls_port, mapper_port = free_port(), free_port(), free_port()
        make_certificates(self.dir)
        (self.dir / "enabled_plugins").write_text("[rabbitmq_auth_mechanism_ssl].\n")
        (self.dir / "env.conf").write_text("")
        (self.dir / "rabbitmq.conf").write_text(
            f"listeners.tcp.1 = 127.0.0.1:{port}\n"
            f"listeners.ssl.1 = 127.0.0.1:{tls_port}\n"
            f"ssl_options.cacertfile = {self.dir}/ca.pem\n"
            f"ssl_options.certfile = {self.dir}/localhost.pem\n"
            f"ssl_options.keyfile = {self.dir}/localhost-key.pem\n"
            "ssl_options.verify = verify_peer\n"
            "ssl_options.fail_if_no_peer_cert = false\n"
            "ssl_cert_login_from = common_name\n"
            "auth_mechanisms.1 = PLAIN\n"
            "auth_mechanisms.2 = AMQPLAIN\n"
            "auth_mechanisms.3 = EXTERNAL\n"
            "vm_memory_high_watermark.absolute = 1GB\n"
            "disk_free_limit.absolute = 50MB\n"
            "log.console = false\n"
        )
        env = {name: value for name, value in os.environ.items() if not name.startswith("RABBITMQ_")}
        env |= {
            "HOME": str(self.dir),  # the Erlang cookie lives there
            "LANG": "C.UTF-8",
            "ERL_EPMD_PORT": str(mapper_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            # A long name with a number for a host, so that no host name has to resolve.
            "RABBITMQ_NODENAME": f"sweepea-{os.getpid()}@127.0.0.1",
            "RABBITMQ_USE_LONGNAME": "true",
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_CONF_ENV_FILE": str(self.dir / "env.conf"),
            "RABBITMQ_CONFIG_FILE": str(self.dir / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.dir / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(self.dir / "data"),
            "RABBITMQ_LOG_BASE": str(self.dir / "log"),
            "RABBITMQ_PID_FILE": str(self.dir / "pid"),
            "RUNNING_UNDER_SYSTEMD": "true",  # makes the script become the node instead of watching over it
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        }
        # Started by hand, because the one a node starts for itself is a daemon that outlives it.
        self.spawn(["epmd", "-port", str(mapper_port), "-address", "127.0.0.1"], env)
        node = self.spawn([str(sbin / "rabbitmq-server")], env)
        end = time.monotonic() + NODE_START_LIMIT
        while not answers_amqp(port):
            if node.poll() is not None or time.monotonic() > end:
                raise Failure(f"RabbitMQ did not start, its output is in {self.dir.relative_to(ROOT)}:\n{self.last_words()}")
            time.sleep(0.1)
        return {
            "SWEEPEA_TEST_BROKER": f"amqp://guest:guest@127.0.0.1:{port}/%2F",
            "SWEEPEA_TEST_BROKER_TLS": f"127.0.0.1:{tls_port}",
            "SWEEPEA_TEST_CERTIFICATES": str(self.dir),
        }

    def spawn(self, command, env):
        with open(self.dir / "output", "ab") as output:
            child = subprocess.Popen(
                command,
                cwd=self.dir,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        self.sessions.append(child.pid)
        return child

    def last_words(self):
        return "\n".join((self.dir / "output").read_text(errors="replace").splitlines()[-15:])

    def stop(self):
        for session in self.sessions:
            kill_session(session)
        self.sessions.clear()

    def remove(self):
        shutil.rmtree(self.dir, ignore_errors=True)


CERTIFICATES = """
[req]
distinguished_name = name
[name]
[authority]
basicConstraints = critical, CA:TRUE
[localhost]
basicConstraints = critical, CA:FALSE
subjectAltName = DNS:localhost, IP:127.0.0.1
[guest]
basicConstraints = critical, CA:FALSE
[nobody]
basicConstraints = critical, CA:FALSE
"""


def make_certificates(folder):
    """An authority for this run, and what it certifies: the node, a user that the node knows, and one that it does not."""
    (folder / "openssl.conf").write_text(CERTIFICATES)
    for name, file in (("authority", "ca"), ("localhost",) * 2, ("guest",) * 2, ("nobody",) * 2):
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        command += ["-config", "openssl.conf", "-extensions", name, "-subj", f"/CN={name}", "-days", "2"]
        command += ["-keyout", f"{file}-key.pem", "-out", f"{file}.pem"]
        if file != "ca":
            command += ["-CA", "ca.pem", "-CAkey", "ca-key.pem"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise Failure(f"{' '.join(command)} failed:\n{done.stderr}".rstrip())


def answers_amqp(port):
    """A node listens last of all, so one that answers the protocol header is ready."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as peer:
        peer.sendall(b"AMQP\0\0\x09\x01")
        return peer.recv(1) == b"\x01"
    return False


def sweep_old_nodes():
    """Directories of runs that are no more."""
    for old in CACHE.glob("rabbitmq-*"):
        if not Path("/proc", old.name.rsplit("-", 1)[1]).exists():
            shutil.rmtree(old, ignore_errors=True)


# ---- Python ----


def make_venv():
    """A venv with the pinned clients, made once for each interpreter and list of pins."""
    pins = ROOT / "tests/python/requirements.txt"
    key = hashlib.sha256(pins.read_bytes() + sys.version.encode() + sys.executable.encode()).hexdigest()[:12]
    venv = CACHE / f"venv-{key}"
    with open(CACHE / "venv.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (venv / "complete").exists():
            shutil.rmtree(venv, ignore_errors=True)
            for command in (
                [sys.executable, "-m", "venv", str(venv)],
                [str(venv / "bin/python"), "-m", "pip", "install", "-q", "--disable-pip-version-check", "-r", str(pins)],
            ):
                done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
                if done.returncode:
                    raise Failure(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}".rstrip())
            (venv / "complete").touch()
    return str(venv / "bin/python")


# ---- steps ----

RESULT = re.compile(r"^test result: \w+\. (\d+) passed; (\d+) failed; (\d+) ignored;")
# Python's unittest: it tells how many ran, and in another line how many of them failed.
RAN = re.compile(r"^Ran (\d+) tests? in ")
FAILED = re.compile(r"^FAILED \((?:failures=(\d+))?(?:, )?(?:errors=(\d+))?")


class Run:
    """The steps so far: how long each took, and what the tests in it said."""

    def __init__(self):
        self.passed = 0
        self.failed = 0
        self.ignored = 0
        self.session = None
        self.rows = []

    def step(self, name, command, env=None, leftovers_fail=False):
        """Runs one command, shows its output as it comes, and counts what libtest or unittest reports in it."""
        print(f"\n== {name}: {' '.join(command)}", flush=True)
        begin = time.monotonic()
        passed, failed, ignored, running = 0, 0, 0, set()
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | (env or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        self.session = child.pid

        def read():
            nonlocal passed, failed, ignored
            for raw in child.stdout:
                line = raw.decode(errors="replace").rstrip("\n")
                print(line, flush=True)
                if match := RESULT.match(line):
                    counts = [int(n) for n in match.groups()]
                    passed, failed, ignored = passed + counts[0], failed + counts[1], ignored + counts[2]
                elif match := RAN.match(line):
                    passed += int(match.group(1))
                elif match := FAILED.match(line):
                    bad = sum(int(count or 0) for count in match.groups())
                    passed, failed = passed - bad, failed + bad

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        problem = None
        try:
            code = child.wait(timeout=STEP_LIMIT)
        except subprocess.TimeoutExpired:
            code, problem = 1, f"not done after {STEP_LIMIT // 60} minutes, killed"
        left = session_members(child.pid)
        if leftovers_fail and left and not problem:
            wait_gone(left, 5)
            left = session_members(child.pid)
            if left:
                problem = "left running: " + ", ".join(f"{command_line(pid)} ({pid})" for pid in left)
        kill_session(child.pid)
        reader.join(timeout=30)
        self.session = None

        # A step that fails without a failing test (it did not compile, the process died) still counts as one failure.
        if problem or (code and not failed):
            failed += 1
        took = time.monotonic() - begin
        verdict = "failed" if failed else "ok"
        if problem:
            print(f"{name}: {problem}")
        print(f"== {name}: {verdict} after {took:.1f} s", flush=True)
        self.rows.append((name, verdict, took, passed, failed, ignored))
        self.passed, self.failed, self.ignored = self.passed + passed, self.failed + failed, self.ignored + ignored
        return not failed

    def timed(self, name, action):
        """Something to set up, with the time it takes; if it cannot be, the run ends."""
        print(f"\n== {name}", flush=True)
        begin = time.monotonic()
        result = action()
        took = time.monotonic() - begin
        print(f"== {name}: ok after {took:.1f} s", flush=True)
        self.rows.append((name, "ok", took, 0, 0, 0))
        return result

    def summary(self):
        if self.rows:
            print(f"\n{'step':<34} {'':<7} {'seconds':>8} {'passed':>7} {'failed':>7} {'ignored':>8}")
            for name, verdict, took, passed, failed, ignored in self.rows:
                counts = f"{passed:>7} {failed:>7} {ignored:>8}" if passed or failed or ignored else ""
                print(f"{name:<34} {verdict:<7} {took:>8.1f} {counts}".rstrip())
        print(f"\n{self.passed} passed, {self.failed} failed", flush=True)


def metadata(*options):
    done = subprocess.run(
        ["cargo", "metadata", "--format-version", "1", *options, *LOCKED], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise Failure(f"cargo metadata failed: {done.stderr.strip()}")
    return json.loads(done.stdout)


def host():
    told = subprocess.run(["rustc", "-vV"], cwd=ROOT, capture_output=True, text=True)
    return re.search(r"^host: (.*)$", told.stdout, re.MULTILINE).group(1)


def oldest_compiler(run, cargo):
    """The compiler that Cargo.toml promises will do: for what is locked, by its own word, and, where rustup has that compiler, for all of ours.
    What std has learnt since, clippy finds in any case."""
    promised = cargo["packages"][0]["rust_version"]

    def number(version):
        return [int(part) for part in version.split(".")[:2]]

    def ask_the_locked():
        newer = [
            f"{package['name']} {package['version']} wants {package['rust_version']}"
            for package in metadata("--filter-platform", host())["packages"]
            if package["rust_version"] and number(package["rust_version"]) > number(promised)
        ]
        if newer:
            raise Failure(f"Cargo.toml promises rust {promised}, but Cargo.lock has newer: {', '.join(newer)}")

    run.timed(f"rust {promised} for what is locked", ask_the_locked)
    known = subprocess.run(["rustup", "toolchain", "list"], capture_output=True, text=True) if shutil.which("rustup") else None
    if known and any(line.startswith(f"{promised}-") for line in known.stdout.splitlines()):
        check = ["rustup", "run", promised, "cargo", "check", "--workspace", "--all-targets", "--target-dir", "target/oldest"]
        run.step(f"rust {promised}", [*check, *LOCKED])
    else:
        print(f"rust {promised} itself is not here to be asked: rustup toolchain install {promised} --profile minimal", flush=True)


def lint(run, cargo):
    for tool in ("rustfmt", "cargo-clippy"):
        if not shutil.which(tool):
            raise Failure(f"install first: {tool} (rustup component add rustfmt clippy)")
    run.step("format", ["cargo", "fmt", "--all", "--check"])
    run.step("clippy", ["cargo", "clippy", "--workspace", "--all-targets", *LOCKED, "--", "-D", "warnings"])
    oldest_compiler(run, cargo)
    run.step("amqp without the kernel", ["cargo", "check", "-p", "sweepea-amqp", "--no-default-features", *LOCKED])
    run.step("amqp without TLS", ["cargo", "check", "-p", "sweepea-amqp", *LOCKED])
    doc = ["cargo", "doc", "--workspace", "--no-deps", "--exclude", "benches", "--exclude", "tests", *LOCKED]
    # The docs of a public item may name a private one: whoever reads that far has the sources.
    run.step("links in the docs", doc, env={"RUSTDOCFLAGS": "-D warnings -A rustdoc::private_intra_doc_links"})


def unit(run, cargo, filters):
    others = [
        option
        for package in cargo["packages"]
        for target in package["targets"]
        if target["kind"] == ["test"] and target["name"] != "it"
        for option in ("--test", target["name"])
    ]
    cargo_test = ["cargo", "test", *TESTED, "--no-fail-fast", *LOCKED]
    run.step("unit", [*cargo_test, "--lib", "--bins", *others, "--", *filters])
    run.step("doc", [*cargo_test, "--doc", "--", *filters])
    if not filters:
        run.step("python worker", [sys.executable, "-B", "olive/python/test_olive_worker.py"])


def integration(run, name, env, arguments):
    command = ["cargo", "test", *TESTED, "--test", "it", *LOCKED, "--", *arguments]
    run.step(f"integration, {name}", command, env=env, leftovers_fail=True)


# Tests that leak on purpose. The sanitizer could be told by the name of a function, but only where llvm-symbolizer is installed.
FORGETFUL = (
    "kernel_model",  # the worlds of random programs
    "kernel_curio",
    "a_leaked_kernel_drops_nothing",
    "a_forgotten_wait_hurts_nobody",
    "a_wait_that_was_forgotten_with_its_kernel",
    "the_matrix_of_ends_deeds_and_times",  # payloads that panic when they are dropped
    "a_value_is_a_keys_own_whoever_is_first_to_use_it",  # keys live for ever
)
# System calls are counted without those of the sanitizer.
COUNTED = ("kernel_budget",)


def sanitizers(run, filters):
    """The kernel under the address sanitizer, leaks included, and loom on what threads meet at. There is no run under the thread sanitizer:
    docs/contributing.md says why."""
    env = {
        "RUSTC_BOOTSTRAP": "1",
        "RUSTFLAGS": "-Zsanitizer=address -Cunsafe-allow-abi-mismatch=sanitizer",
    }
    # With a target named, the flags are for it alone: build scripts and macros stay as they are.
    cargo_test = ["cargo", "test", "--target", "x86_64-unknown-linux-gnu", "--target-dir", "target/asan", "--no-fail-fast", *LOCKED]
    run.step("address sanitizer, unit", [*cargo_test, "-p", "sweepea-kernel", "--lib", "--", *filters], env=env)
    it = [*cargo_test, "-p", "tests", "--test", "it", "--"]
    skip = [option for name in (*FORGETFUL, *COUNTED) for option in ("--skip", name)]
    run.step("address sanitizer, integration", [*it, *(filters or ["kernel_"]), *skip], env=env)
    if not filters:
        lenient = env | {"ASAN_OPTIONS": "detect_leaks=0"}
        run.step("address sanitizer, leaks allowed", [*it, *FORGETFUL, "--skip", "kernel_curio"], env=lenient)
    # Loom needs optimised code, but not the minutes that the last per cent costs.
    quick = {"CARGO_PROFILE_RELEASE_LTO": "off", "CARGO_PROFILE_RELEASE_CODEGEN_UNITS": "16"}
    loom = ["cargo", "test", "-p", "sweepea-kernel", "--lib", "--release", "--target-dir", "target/loom", *LOCKED]
    run.step("loom", [*loom, "--", "loom"], env=quick | {"RUSTFLAGS": "--cfg loom"})


def run_parts(run, parts, filters, node):
    for tool, hint in (("cargo", "rustup, https://rustup.rs"), ("cc", "apt-get install gcc libc6-dev")):
        if not shutil.which(tool):
            raise Failure(f"install first: {tool} ({hint})")
    CACHE.mkdir(exist_ok=True)
    sweep_old_nodes()
    cargo = metadata("--no-deps")
    python = run.timed("python clients", make_venv) if {"embedded", "rabbitmq"} & parts else None
    if "lint" in parts:
        lint(run, cargo)
    if "sanitizers" in parts:
        sanitizers(run, filters)
    if not {"unit", "embedded", "rabbitmq", "nodes"} & parts:
        return
    # Everything at once, because the tests' own dependencies change the features that olive's are built with.
    if not run.step("build", ["cargo", "build", *TESTED, "--bins", "--tests", *LOCKED]):
        return
    debug = Path(cargo["target_directory"], "debug")
    if "unit" in parts:
        unit(run, cargo, filters)
        if not filters:
            run.step("fuzz", [str(debug / "fuzz"), "--seconds", "60"])
    # No broker is under test there: they start RabbitMQ nodes of their own.
    if "nodes" in parts:
        integration(run, "nodes", {}, [*(filters or ["nodes::"]), "--test-threads", "2"])
    if not {"embedded", "rabbitmq"} & parts:
        return
    shared = ["--skip", "nodes::"]
    env = {
        "SWEEPEA_TEST_OLIVE": str(debug / "olive"),
        "SWEEPEA_TEST_PYTHON": python,
    }
    if "embedded" in parts:
        # What our own broker does not have: TLS, EXTERNAL.
        others = ["--skip", "rabbitmq_only"]
        integration(run, "embedded broker", env | {"SWEEPEA_TEST_BROKER": "embedded"}, [*filters, *others, *shared])
    if "rabbitmq" in parts:
        told = run.timed("start RabbitMQ", node.start)
        # The kernel's tests need no broker and the demo has its own; the run against the embedded one has had them.
        once = ["--skip", "kernel_", "--skip", "demo::"]
        integration(run, "RabbitMQ", env | told, [*filters, *once, *shared])


LOCKED = ["--locked"] if os.environ.get("CI") else []


def main():
    options = argparse.ArgumentParser(
        prog="tests/run",
        description="Sets up what the tests need, runs them all, stops what it started, and ends with one line of totals.",
        epilog="examples:  tests/run    tests/run --only unit    tests/run --only embedded seed::",
    )
    options.add_argument("--only", action="append", choices=PARTS + EXTRAS, help="run this part alone; may be given more than once")
    options.add_argument("filter", nargs="*", help="run only tests whose name contains one of these (no lints and no nodes then)")
    given = options.parse_args()
    parts = set(given.only or PARTS)
    if given.filter and not given.only:
        parts -= {"lint", "nodes"}

    def stop(number, _frame):
        raise Stopped(number)

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in signals:
        signal.signal(number, stop)

    run, node, code = Run(), RabbitMQ(), None
    try:
        run_parts(run, parts, given.filter, node)
    except Stopped as stopped:
        print(f"\nstopped by {stopped}", flush=True)
        code = 128 + stopped.number
    except Failure as failure:
        print(f"tests/run: {failure}", file=sys.stderr, flush=True)
        run.failed += 1
    finally:
        for number in signals:
            signal.signal(number, signal.SIG_IGN)
        if run.session:
            kill_session(run.session)
        node.stop()
    if run.failed == 0:
        node.remove()
    if run.passed + run.failed == 0 and parts - {"lint"} and code is None:
        print("no test ran" + (f": none is called like {' or '.join(given.filter)}" if given.filter else ""))
        code = 1
    run.summary()
    sys.stdout.flush()
    return code if code is not None else int(run.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
