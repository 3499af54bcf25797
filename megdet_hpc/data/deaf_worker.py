"""First import of the server that forks loader workers: Ctrl-C, which a terminal sends to all, is left to the rank.

Nothing else imports it, since importing it changes the process.
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_IGN)
