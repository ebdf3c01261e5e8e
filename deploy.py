#!/usr/bin/env python3
"""vecmill on a machine of its own: `sudo python3 deploy.py`. `--dry-run` shows what it would do, `--help` the rest."""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - whoever starts it with an older Python is told so
    sys.exit("deploy.py needs Python 3.11 or newer (Ubuntu 24.04 has 3.12): python3.12 deploy.py")

sys.dont_write_bytecode = True  # root's files have no place in somebody's clone

from deployment.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
