"""The process in which generated code runs: `sandbox` starts this file, nothing imports it.

It imports the standard library only, limits itself, and cannot take that back: resource limits,
an audit hook (which Python has no way to remove), and, where it was root, an ordinary user. The
program comes as JSON on stdin; one line of JSON with its outcome goes to stdout.
"""

import builtins
import contextlib
import json
import os
import resource
import sys

NOBODY = 65534
PROCESS_EVENTS = (
    "subprocess.",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "pty.spawn",
    "os.kill",
    "signal.pthread_kill",
    "ctypes.dlsym",
    "ctypes.call_function",
)
FILE_EVENTS = (
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "os.chflags",
    "os.setxattr",
    "os.removexattr",
    "os.utime",
    "os.mkfifo",
    "os.mknod",
    "shutil.",
)
# These create files without an audit event: functions of os, and modules in C.
FILE_FUNCTIONS = ("mkfifo", "mknod")
FILE_MODULES = ("_dbm", "_gdbm", "_posixshmem")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Forbidden(BaseException):
    """Generated code tried what it may not do; not an Exception, so that few handlers catch it."""


def find_violation(event, arguments):
    """Returns what an audit event does that is forbidden, "" if nothing."""
    if event.startswith("socket."):
        return "network: tried to open a socket"
    if event.startswith(PROCESS_EVENTS):
        return f"process: tried to start or stop a process ({event})"
    if event.startswith(FILE_EVENTS):
        return f"file: tried to change {arguments[0]!r} ({event})"

    if event == "import" and arguments[0] in FILE_MODULES:
        return f"file: tried to load {arguments[0]}"
    if event == "sqlite3.connect" and arguments[0] != ":memory:":
        return f"file: tried to write {arguments[0]!r}"

    if event == "open":
        # `open` reports a mode, `os.open` flags.
        path, mode, flags = arguments

        is_writing = bool((flags or 0) & WRITING) or bool(set(mode or "") & set("wax+"))
        if is_writing and path != os.devnull and not isinstance(path, int):
            return f"file: tried to write {path!r}"
    return ""


def refuse_file_functions():
    """Makes functions that create files raise an audit event, which they lack."""

    def audited(name):
        return lambda path, *args, **options: sys.audit(f"os.{name}", path)

    for name in FILE_FUNCTIONS:
        for module in (os, sys.modules["posix"]):
            if hasattr(module, name):
                setattr(module, name, audited(name))


def limit_process(limits):
    """Sets the limits of memory, CPU time, files and processes, and gives up root."""
    # The parent stops the process first: the limit of CPU time is a second longer.
    sizes = {
        resource.RLIMIT_AS: limits["memory"],
        resource.RLIMIT_CPU: limits["seconds"] + 1,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: 1,
    }

    # The limit of processes does not apply to root.
    if os.geteuid() == 0:
        drop_root()

    # The hard limit as well, which an ordinary user cannot raise again.
    for name, size in sizes.items():
        with contextlib.suppress(ValueError, OSError):  # macOS has no limit of the address space
            resource.setrlimit(name, (size, size))


def drop_root():
    """Becomes the user nobody, if that user can read the standard library."""
    # The effective user can still be changed back, if nobody cannot read the library.
    try:
        os.seteuid(NOBODY)
        with open(os.__file__, "rb"):
            pass
    except OSError:
        os.seteuid(0)
        return
    os.seteuid(0)

    # Not to be undone: group and user, real and saved.
    with contextlib.suppress(OSError):
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def run_program(program):
    """Runs code, setup and tests in one namespace; returns why they failed, "" if all passed."""
    # Recorded as well as raised, as the code may catch the exception.
    violations = []

    def audit(event, arguments):
        violation = find_violation(event, arguments)
        if violation:
            violations.append(violation)
            raise Forbidden(violation)

    refuse_file_functions()
    sys.addaudithook(audit)

    reason = ""
    try:
        run_steps(program)
    except Forbidden as error:
        reason = str(error)
    except MemoryError:
        reason = f"memory: needed more than {program['limits']['memory'] >> 20} MiB"
    except AssertionError as error:
        reason = f"wrong: {error}"
    except SyntaxError as error:
        place = f" (line {error.lineno})" if error.lineno else ""
        reason = f"syntax: {error.msg}{place}"
    except SystemExit:
        reason = "exit: ended before the tests were done"
    except BaseException as error:  # KeyboardInterrupt and the like come from the code itself
        reason = f"error: {type(error).__name__}: {error}"

    reason = violations[0] if violations else reason  # also where the code caught it
    return " ".join(reason.split())[:300]


def run_steps(program):
    """Executes the code, then each test. Raises what they raise; a test's message is the test."""
    namespace = {"__name__": "__main__", "__builtins__": builtins}
    for source in (program["code"], program["setup"]):
        exec(compile(source, "<answer>", "exec"), namespace)

    for test in program["tests"]:
        try:
            exec(compile(test, "<test>", "exec"), namespace)
        except AssertionError as error:
            raise AssertionError(test) from error


def main():
    """Reads the program, runs it with all output discarded, and writes its outcome."""
    program = json.load(sys.stdin)

    # The outcome goes to a copy of stdout; what the code prints is discarded.
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)

    sys.dont_write_bytecode = True
    limit_process(program["limits"])
    reason = run_program(program)
    results.write(json.dumps({"token": program["token"], "reason": reason}) + "\n")
    results.flush()
    os._exit(0)  # no exit handlers of the code


if __name__ == "__main__":
    main()
