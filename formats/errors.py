"""The one error family: what happened, where, and what to do about it."""


class ConvertError(Exception):
    """A failure that the user can understand and act upon.

    what: one sentence that says what is wrong.
    where: the file, tensor, key or option it was found in.
    remedy: what to do next, an exact command where there is one.
    """

    exit_code = 1
    log: str | None = None
    """The log of the job that failed, where it has one: all of what it said, and the traceback."""

    def __init__(self, what: str, where: str, remedy: str):
        super().__init__(what, where, remedy)
        self.what, self.where, self.remedy = what, where, remedy

    def __str__(self) -> str:
        text = f"{self.what}\n  where: {self.where}\n  remedy: {self.remedy}"
        return text if self.log is None else f"{text}\n  log: {self.log}"

    def to_dict(self) -> dict[str, str]:
        """As plain JSON data."""
        told = {"what": self.what, "where": self.where, "remedy": self.remedy}
        return told if self.log is None else {**told, "log": self.log}


class TryAgain(ConvertError):
    """A failure of the moment, by the network or by another process: the same command may succeed later."""

    exit_code = 75
    """EX_TEMPFAIL of sysexits.h, by which schedulers tell what to run again."""


def nearest(name: str, known: list[str]) -> str:
    """The clause "did you mean ...?" for a misspelt name, or the list of known names."""
    import difflib

    by_folded = {candidate.casefold(): candidate for candidate in known}
    matches = difflib.get_close_matches(name.casefold(), list(by_folded), n=1, cutoff=0.5)
    return f"did you mean {by_folded[matches[0]]!r}?" if matches else f"known: {', '.join(known)}"
