"""Imported first by the server that forks loader workers: Ctrl-C, which a terminal sends to all, is the rank's alone.

Nothing else imports it, since importing it changes the process.
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_IGN)
