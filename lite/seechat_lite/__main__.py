"""Starts the command `seechat`, also as `python -m seechat_lite`."""

import signal
import sys

from seechat_lite.interrupts import leave_on_ctrl_c


def main() -> int:
    """Run the command line and return its exit code."""
    leave_on_ctrl_c()  # before any import that takes time
    from seechat_lite.cli.main import main

    code = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the work is done; let Python clean up
    return code


if __name__ == "__main__":
    sys.exit(main())
