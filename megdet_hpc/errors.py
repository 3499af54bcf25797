"""The one exception that means "the user can mend this": printed without a traceback at start-up."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input: a value, file or combination that the user can correct. The message says which and how."""
