"""The tests of vecmill.

Set here, before anything that reads it once is imported: what the tests' processes inherit, so that they find the same
wherever they run: in a script's background, under `nohup`, on a dumb terminal, behind a proxy, in any language, with a
strict umask. The time zone is left as it is: nothing that vecmill says depends on it.
"""

from __future__ import annotations

import os
import pwd
import signal
import threading

# What programs and libraries adapt to. Settings of vecmill itself are taken away in `conftest.hermetic`.
TERMINAL = ("CLICOLOR", "CLICOLOR_FORCE", "COLUMNS", "FORCE_COLOR", "GITHUB_ACTIONS", "LINES", "NO_COLOR", "PY_COLORS")
TERMINAL_OF_RICH = ("TERMINAL_WIDTH", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "_TYPER_FORCE_DISABLE_TERMINAL")
PROXIES = tuple(f"{scheme}_proxy" for scheme in ("all", "ftp", "http", "https", "no", "ws", "wss"))
LANGUAGE = ("LANG", "LANGUAGE", "LC_CTYPE", "LC_MESSAGES", "LC_NUMERIC", "LC_TIME")
PYTHON = ("PYTHONIOENCODING", "PYTHONUTF8", "PYTHONWARNINGS")
SERVICE = ("INVOCATION_ID", "JOURNAL_STREAM", "LISTEN_FDS", "LISTEN_PID", "NOTIFY_SOCKET", "WATCHDOG_USEC")
HUB = ("HF_ENDPOINT", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
SDKS = ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID")
UNSET = (*TERMINAL, *TERMINAL_OF_RICH, *LANGUAGE, *PYTHON, *SERVICE, *HUB, *SDKS, *PROXIES, *map(str.upper, PROXIES))
# Several processes of the tests share the cores: threads that wait for one another take longer than one that does all.
THREADS = {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000"}
SET = {"HF_HUB_OFFLINE": "1", "LC_ALL": "C.UTF-8", "TERM": "xterm-256color", **THREADS}


def _prepare() -> None:
    for name in UNSET:
        os.environ.pop(name, None)
    os.environ.update(SET)
    os.environ.setdefault("HOME", pwd.getpwuid(os.getuid()).pw_dir)
    os.umask(0o022)
    # Processes inherit an ignored signal: Ctrl-C would not reach those that the tests send it to.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


_prepare()
