"""The boundary to the user: what the system or an input raises, anywhere, becomes an error in three lines."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from bitwright.formats.errors import ConvertError

_REMEDIES = {
    errno.ENOSPC: "make room, then run the same command again",
    errno.EDQUOT: "make room, then run the same command again",
    errno.EACCES: "give yourself the right to it, or name another place",
    errno.EPERM: "give yourself the right to it, or name another place",
    errno.EROFS: "name a place that can be written, with --output and --work-dir",
    errno.ENAMETOOLONG: "use a shorter name: of the model's directory, or with --output and --work-dir",
    errno.ENOENT: "check the path; a link may lead nowhere",
    errno.ELOOP: "remove one of the links that lead to each other",
    errno.EMFILE: "allow more open files: ulimit -n 4096",
    errno.EIO: "check the disk, or use another one",
}


@contextmanager
def clear_errors() -> Iterator[None]:
    """Raises ConvertError for an error of the system, text that cannot be decoded, data that is nested too deeply, and
    a lack of memory.

    A broken pipe is raised as it is: nobody reads our output any more, so nobody can be told.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        places = [str(name) for name in (error.filename, error.filename2) if name is not None]
        reason = error.strerror or (str(error).strip() or type(error).__name__).splitlines()[0]
        remedy = _REMEDIES.get(error.errno or 0, "remove the cause, then run the same command again")
        raise ConvertError(
            f"the system refuses: {reason}", ", ".join(places) or "a file or a connection", remedy
        ) from error
    except UnicodeError as error:
        raise ConvertError(
            f"a text cannot be read: {error}", "a text of the model or the command", "write it in UTF-8"
        ) from error
    except RecursionError as error:
        raise ConvertError(
            "something is nested too deeply", "a file of the model", "fetch the model's files again"
        ) from error
    except MemoryError as error:
        raise ConvertError(
            "the memory does not suffice", str(error) or "this process", "use a machine with more, or a smaller model"
        ) from error
