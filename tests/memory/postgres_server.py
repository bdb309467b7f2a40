"""A PostgreSQL server of the tests' own: in a temporary folder, on a Unix socket, gone afterwards.

The server's programs are looked for on the path and where Debian keeps them; nothing is installed here. It
refuses to run as root, so root runs it as the user Debian's package makes. Texts are sorted as in a
language, not by bytes, because that is how most servers are set up and SQLite is not.
"""

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

# Durability is the server's own business and not tested here; syncing would take most of the time.
OPTIONS = "-c listen_addresses= -c fsync=off -c synchronous_commit=off -c full_page_writes=off"


class NoServer(Exception):  # noqa: N818
    """No server can be started on this machine; the text says why."""


def _program(name: str) -> str:
    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: path.parts[-3])
    found = shutil.which(name) or (str(debian[-1]) if debian else None)
    if found is None:
        raise NoServer(f"PostgreSQL's {name} is not installed (Debian: apt-get install postgresql)")
    return found


def _run(command: Sequence[str], user: str | None, folder: Path) -> None:
    # Its output goes to a file, since the server inherits it and would keep a pipe open.
    options: dict[str, object] = {"user": user, "group": user, "extra_groups": []} if user else {}
    with (folder / "log").open("ab") as log:
        done = subprocess.run(command, cwd=folder, stdout=log, stderr=log, timeout=120, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise NoServer(f"{Path(command[0]).name} failed: {(folder / 'log').read_text()[-400:]}")


@contextlib.contextmanager
def server(options: str = OPTIONS) -> Iterator[str]:
    """Run a server and yield its URL, which names its one database.

    Raises:
        NoServer: it cannot be run here.
    """
    initdb, control, user = _program("initdb"), _program("pg_ctl"), None
    if os.geteuid() == 0:
        user = "postgres"
        try:
            account = pwd.getpwnam(user)
        except KeyError as error:
            raise NoServer("PostgreSQL refuses to run as root, and there is no user postgres") from error
    with tempfile.TemporaryDirectory(prefix="pg-") as place:  # short: a socket's path has 107 bytes
        folder = Path(place)
        if user:
            os.chown(folder, account.pw_uid, account.pw_gid)
        data = folder / "data"
        language = ["--encoding=UTF8", "--locale=C.UTF-8", "--locale-provider=icu", "--icu-locale=en"]
        _run([initdb, "-D", str(data), "-U", "persona", "--auth=trust", "-N", *language], user, folder)
        _run([control, "-D", str(data), "-w", "-o", f"{options} -k {folder}", "start"], user, folder)
        try:
            yield f"postgresql+psycopg://persona@/postgres?host={folder}"
        finally:
            _run([control, "-D", str(data), "-w", "-m", "immediate", "stop"], user, folder)
