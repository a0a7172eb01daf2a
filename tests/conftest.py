"""What holds for all tests."""

from __future__ import annotations

import signal

# A shell starts its background jobs with SIGINT ignored, which the processes that tests start and
# interrupt would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
