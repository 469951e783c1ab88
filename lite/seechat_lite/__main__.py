"""`python -m seechat_lite` is the command `seechat`."""

from seechat_lite.cli import main

raise SystemExit(main())
