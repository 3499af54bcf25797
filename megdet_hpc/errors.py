"""Exceptions that are printed as one line, without a traceback."""

from __future__ import annotations

import errno

# Errors of a storage device, of a file server or of the way to it; not of a name or a permission.
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
        status: exit status of a program that ends with this error. Jobs do not try again after 2.
    """

    status = 2


class MachineError(UserError):
    """A failure of a node, its network or its file system. Another attempt may work, which its status says."""

    status = 1


def is_machine_fault(error: BaseException) -> bool:
    """Whether a file operation failed because of the machine, not because the file is missing, closed or damaged."""
    return isinstance(error, OSError) and error.errno in _MACHINE_FAULTS


def file_error(error: OSError, text: str, kind: type[UserError] = UserError) -> UserError:
    """What to raise for a file operation that failed: a MachineError where the machine failed, else `kind`."""
    return (MachineError if is_machine_fault(error) else kind)(text)
