"""The exceptions that Veilgraft raises on purpose.

    VeilgraftError          exit 1   something of ours went wrong
    ├── InputError          exit 2   a file, key or value that the user can put right
    ├── MessageError        exit 1   a message that is not of the agreed form
    ├── RefusedError        exit 3   policy or budget says no
    └── QuorumError         exit 4   too few sites answered in time

A library raises; only the command line prints and exits.
"""

from collections.abc import Sequence
from enum import StrEnum


class VeilgraftError(Exception):
    """Root of all errors that are Veilgraft's own."""

    exit_code = 1


class InputError(VeilgraftError):
    """Input that can't be used; holds one sentence for each mistake found."""

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        self.problems: Sequence[str] = problems
        super().__init__("\n".join(problems))


class MessageError(VeilgraftError):
    """A message from the other side that is not of the agreed form."""


class Refusal(StrEnum):
    """The fixed codes with which a site says no; all that a coordinator learns of a refusal.

    Every cause that depends on records or on what was spent is `UNAVAILABLE`.
    """

    UNAVAILABLE = "unavailable"
    STUDY_NOT_APPROVED = "study-not-approved"
    REQUEST_INVALID = "request-invalid"
    HEAD_INVALID = "head-invalid"
    ROUND_CONFLICT = "round-conflict"


class RefusedError(VeilgraftError):
    """Policy or budget says no.

    Attributes:
        code: what may leave the site.
        detail: the reason in full, for the site's own console and log alone.
    """

    exit_code = 3

    def __init__(self, code: Refusal, detail: str) -> None:
        self.code = code
        self.detail = detail
        super().__init__(detail)

    def __reduce__(self) -> tuple[type["RefusedError"], tuple[Refusal, str]]:
        """Let it pass from one process to another; an exception's own way knows one argument."""
        return type(self), (self.code, self.detail)


class QuorumError(VeilgraftError):
    """Fewer sites than the study's quorum gave a valid release within the timeout."""

    exit_code = 4
