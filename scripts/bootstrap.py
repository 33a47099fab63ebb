"""python3.11 scripts/bootstrap.py: make `.venv` and install the requirements, once (`make run` and its like call this).

Needs nothing but Python 3.11 itself. Where an NVIDIA driver answers, the GPU stack is installed too, and with
``--extras`` the packages of requirements-extras.txt (`make test` wants them). A second call with the same requirements
in the same place does nothing; an interrupted one is done again from the beginning.
"""

import ctypes
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
DONE = VENV / ".installed"  # holds the key of what is installed; written last
EXTRAS = VENV / ".extras"  # the same for requirements-extras.txt
BEGUN = VENV / ".installing"  # there while pip works
LOG = VENV / "install.log"
WANTED = (3, 11)


class InstallError(Exception):
    """The sentence for the user."""


def main():
    try:
        check_python()
        with (ROOT / "requirements.txt").open(encoding="utf-8") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                if not ready():
                    print("Another installation into .venv is running; waiting for it.", flush=True)
                fcntl.flock(held, fcntl.LOCK_EX)
            prepare()
            if "--extras" in sys.argv[1:]:
                prepare_extras()
    except InstallError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        reason = error.strerror or error
        sys.exit(f"error: {error.filename or VENV} cannot be written ({reason}); check its owner and the disk.")
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C; the next call installs again", file=sys.stderr)
        sys.exit(130)


def check_python():
    """Raise unless this interpreter is the version that the pinned packages are built for and can make environments."""
    install = "on Debian and Ubuntu: sudo apt install python3.11 python3.11-venv"
    if sys.version_info[:2] != WANTED:
        raise InstallError(
            f"{sys.executable} is Python {platform.python_version()}, but the pinned packages need Python 3.11; "
            f"install it ({install}) or name one: make PYTHON=/path/to/python3.11 run"
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        raise InstallError(
            f"{sys.executable} cannot make virtual environments (the venv package is missing); "
            f"install it ({install}) and run the command again."
        ) from None


def prepare():
    """Bring `.venv` to what the requirements say, or return at once where it is there already."""
    if ready():
        return
    gpu = has_driver()
    requirements = "requirements-gpu.txt" if gpu else "requirements.txt"
    if VENV.exists() and not reusable():
        if VENV.is_symlink():
            raise InstallError(
                f"{VENV} is a link to an environment that was made elsewhere; remove the link to have one made here, "
                f"or use that one: make PY={PYTHON} run"
            )
        shutil.rmtree(VENV)
    if not VENV.exists():
        say("Making .venv")
        made = subprocess.run([sys.executable, "-m", "venv", str(VENV)], capture_output=True, text=True)
        if made.returncode:
            shutil.rmtree(VENV, ignore_errors=True)
            last = (made.stderr or made.stdout).strip().splitlines()[-1:] or [f"exit code {made.returncode}"]
            raise InstallError(f"The virtual environment {VENV} could not be made: {last[0]}")
    DONE.unlink(missing_ok=True)
    BEGUN.touch()
    LOG.unlink(missing_ok=True)
    install(requirements, f"Installing {requirements}" + (" (an NVIDIA driver answers)" if gpu else ""))
    if gpu:
        try:
            install("requirements-tensorrt.txt", "Installing TensorRT", PIP_RETRIES="1")
        except InstallError:
            say(
                "TensorRT could not be installed (see .venv/install.log); only the TF-TRT export needs it. "
                "To try again: .venv/bin/pip install -r requirements-tensorrt.txt"
            )
    DONE.write_text(key(requirements), encoding="utf-8")
    BEGUN.unlink()


def ready():
    """Whether `.venv` holds what the requirements say, or more."""
    enough = {key("requirements-gpu.txt"), *([] if has_driver() else [key("requirements.txt")])}
    return DONE.is_file() and DONE.read_text(encoding="utf-8") in enough and works()


def prepare_extras():
    """Bring the optional packages into `.venv`, or return at once where they are there already."""
    wanted = key("requirements-extras.txt")
    if EXTRAS.is_file() and EXTRAS.read_text(encoding="utf-8") == wanted:
        return
    EXTRAS.unlink(missing_ok=True)
    install("requirements-extras.txt", "Installing requirements-extras.txt")
    EXTRAS.write_text(wanted, encoding="utf-8")


def key(requirements):
    """What decides whether `.venv` is right: the pins, the interpreter, and the place (its scripts hold their path)."""
    files = ("requirements.txt", "requirements-gpu.txt", "requirements-tensorrt.txt", "constraints.txt", requirements)
    content = "".join((ROOT / file).read_text(encoding="utf-8") for file in files)
    digest = hashlib.sha256(content.encode()).hexdigest()
    return f"{requirements} {digest}\nPython {platform.python_version()}\n{VENV}\n"


def works():
    """Whether `.venv` starts; not after its base interpreter was removed."""
    try:
        return subprocess.run([str(PYTHON), "-c", ""], capture_output=True).returncode == 0
    except OSError:
        return False


def reusable():
    """Whether pip may bring an existing `.venv` up to date: whole, of this Python, and made in this place."""
    try:
        first_line = (VENV / "bin" / "pip").read_bytes().split(b"\n")[0].decode()
        version = re.search(
            r"^version\s*=\s*(\d+)\.(\d+)", (VENV / "pyvenv.cfg").read_text(encoding="utf-8"), flags=re.MULTILINE
        )
    except (OSError, UnicodeDecodeError):
        return False
    same_python = version is not None and tuple(map(int, version.groups())) == WANTED
    return not BEGUN.exists() and same_python and str(VENV) in first_line and works()


def has_driver():
    """Whether this machine can use the GPU stack: Linux on x86-64 with an NVIDIA driver that sees a card."""
    if os.environ.get("PIPELINE_DEVICE") == "cpu" or (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return False
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def install(requirements, title, **environment):
    """Run pip, its output in `.venv/install.log` and one line of progress here.

    Raises:
        InstallError: pip failed; the last lines of its output have been printed.
    """
    started = time.monotonic()
    say(f"{title}; this takes a few minutes the first time")
    command = [
        str(PYTHON),
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--no-input",
        "--progress-bar",
        "off",
    ]
    packages, lines = 0, []
    pip = subprocess.Popen(
        [*command, "-r", requirements],
        cwd=str(ROOT),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**environment, **os.environ, "PIP_USER": "0"},  # a setting for other Pythons would fail here
    )
    with LOG.open("a", encoding="utf-8") as log, pip:
        for line in pip.stdout:
            log.write(line)
            log.flush()
            lines.append(line.rstrip())
            if line.startswith(("Collecting", "Requirement already")):
                packages += 1
            doing = f"{packages} packages found"
            if line.startswith("Installing collected packages"):
                doing = f"unpacking {line.count(',') + 1} packages"
            progress(f"  {doing}, {time.monotonic() - started:.0f} s")
    progress("")
    if pip.returncode:
        print("\n".join("  " + line for line in lines[-8:]), file=sys.stderr)
        raise InstallError(reason("\n".join(lines)))
    say(f"  done in {time.monotonic() - started:.0f} s")


def reason(output):
    """One sentence for what pip said."""
    where = "the whole output is in .venv/install.log"
    if re.search(r"No space left on device|Errno 28", output):
        return f"No room on the disk for the packages; free some gigabytes and run the command again ({where})."
    network = (
        r"NewConnectionError|ConnectTimeout|ReadTimeout|Name or service not known|name resolution|SSLError|ProxyError"
    )
    if re.search(network + r"|ConnectionError|Connection reset|IncompleteRead|HTTP error|from versions: none", output):
        return (
            "The packages could not be downloaded; check the network and pip's index and proxy settings "
            f"(pip config list), then run the command again ({where})."
        )
    if re.search(r"No matching distribution found|ResolutionImpossible", output):
        return f"pip's index does not have a pinned package for this machine ({platform.machine()}); {where}."
    return f"pip could not install the packages; {where}."


def say(sentence):
    print(sentence, flush=True)


def progress(text):
    """Rewrite the last line of a terminal; nothing where the output is a file."""
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="", flush=True)


if __name__ == "__main__":
    main()
