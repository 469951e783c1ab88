"""All checks, in the environment that nox runs in: `nox` for the fast ones, `nox -s all` for all.

Sessions make no environments of their own: `pip install -e ".[dev]"` has made one already, and
torch takes minutes to install. `nox -l` lists them; words after `--` go to pytest.
"""

import os
import subprocess
import sys

import nox

nox.options.default_venv_backend = "none"

TYPES = (sys.executable, "-m", "pyright", "--project", ".", "--pythonpath", sys.executable)
QUIET = {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}  # else it asks the registry for a newer version
FAST = "not slow and not browser and not clients and not export and not torch"


@nox.session
def checks(session: nox.Session) -> None:
    """lint, then types and fast at once: under a minute on two idle cores."""
    lint(session)
    with subprocess.Popen(TYPES, env=os.environ | QUIET) as checked:
        fast(session)
    if checked.returncode:
        session.error("types: see above")


@nox.session(default=False)
def lint(session: nox.Session) -> None:
    """Style and common mistakes (ruff); `nox -s format` mends what can be mended."""
    session.run(sys.executable, "-m", "ruff", "check")
    session.run(sys.executable, "-m", "ruff", "format", "--check")


@nox.session(default=False)
def types(session: nox.Session) -> None:
    """Types of weights, lite and export (pyright)."""
    session.run(*TYPES, env=QUIET)


@nox.session(default=False)
def fast(session: nox.Session) -> None:
    """The tests that need neither torch nor a browser and take no seconds each, on all cores."""
    command = ("-m", "pytest", "-q", "-n", "logical", "--hypothesis-profile", "few", "-m", FAST)
    session.run(sys.executable, *command, *session.posargs)


@nox.session(default=False)
def all(session: nox.Session) -> None:
    """Every test, some minutes; those of which something is not installed are skipped."""
    session.run(sys.executable, "-m", "pytest", "-q", *session.posargs)


@nox.session(default=False)
def clients(session: nox.Session) -> None:
    """Install the clients that others wrote, and run the tests with them."""
    session.run(sys.executable, "-m", "pip", "install", "-e", ".[clients]")
    session.run("npm", "install", "--prefix", "tests/clients", "--no-fund", external=True)
    session.run(sys.executable, "-m", "pytest", "-q", "-m", "clients", *session.posargs)


@nox.session(default=False)
def format(session: nox.Session) -> None:
    """Rewrite files as ruff wants them."""
    session.run(sys.executable, "-m", "ruff", "check", "--fix")
    session.run(sys.executable, "-m", "ruff", "format")
