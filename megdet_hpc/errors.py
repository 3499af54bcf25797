"""The exceptions that are printed as one line, without a traceback."""

from __future__ import annotations

import errno

# Of a storage device, a file system's server or the way to it, rather than of a name or a permission.
_MACHINE_FAULTS = {
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EREMOTEIO,
    errno.ENOTCONN,
    errno.ESHUTDOWN,
    errno.EHOSTDOWN,
    errno.ENODEV,
    errno.ENXIO,
}


class UserError(ValueError):
    """Bad input: a value, file or combination that the user can correct. The message says which and how.

    Attributes:
        status: the exit status of a program that ends with it; jobs do not try again after 2.
    """

    status = 2


class MachineError(UserError):
    """A node, its network or its file system fails: worth another attempt, so another status than bad input."""

    status = 1


def is_machine_fault(error: BaseException) -> bool:
    """Whether a file operation failed since the machine did, and not since the file is missing, shut or damaged."""
    return isinstance(error, OSError) and error.errno in _MACHINE_FAULTS
