"""The one exception of the binding, and the status codes of kvc/status.h."""

import enum


class Status(enum.IntEnum):
    """kvc_status: 0 or a negative code."""

    OK = 0
    AGAIN = -1
    NOT_FOUND = -2
    EXISTS = -3
    NO_SPACE = -4
    NO_MEMORY = -5
    INVALID = -6
    UNSUPPORTED = -7
    TIMED_OUT = -8
    CANCELLED = -9
    CLOSED = -10
    IO = -11
    PROTOCOL = -12
    DEVICE = -13
    STALE_HANDLE = -14
    CORRUPT = -15
    UNAVAILABLE = -16
    DENIED = -17


def _status(code):
    try:
        return Status(code)
    except ValueError:
        return None


class KvasirError(RuntimeError):
    """A Kvasir call that failed: .status (a Status, None if unknown), .call and .detail."""

    def __init__(self, code, call, detail=""):
        self.status = _status(code)
        self.call = call
        self.detail = detail
        name = self.status.name if self.status is not None else f"status {code}"
        super().__init__(f"{call}: {name}" + (f": {detail}" if detail else ""))
