"""Every error that visistage raises on purpose.

    VisistageError                 anything the user can fix; the CLI prints it and exits with 2
    ├── ModelError                 a checkpoint that is unknown, incomplete, corrupt or unsupported
    ├── PlanError                  a stage plan that contradicts itself or the model
    ├── TargetError                a target, precision or option that cannot be honoured here
    ├── BundleError                a bundle with a missing, changed or foreign file
    ├── EngineError                an engine that cannot be compiled, or not loaded here
    ├── ParityError                a bundle that computes something else than its checkpoint
    ├── ImageError                 an image that cannot be read
    │   ├── ImageSizeError         ... is too large to decode
    │   └── ImageFormatError       ... is of no format that is read
    ├── PromptError                a prompt, template or sampling option that cannot be used
    ├── BusyError                  an engine that takes no more questions now
    ├── CapacityError              not enough slots, memory or disk for what was asked
    ├── DataError                  a file of samples (JSONL) that cannot be read
    └── MissingDependencyError     an optional library is absent; the message says how to install it

A message has three parts: what was found, what was expected, what to type next. Bugs stay
``AssertionError``, ``TypeError`` and friends: they show a traceback.
"""

import difflib

from .foreign_text import printable, shortened


class VisistageError(Exception):
    """Base of all deliberate errors; ``exit_code`` is what the command line returns.

    Messages quote what others wrote, so they are at most a screen, and steer no terminal.
    """

    exit_code = 2

    def __str__(self) -> str:
        return printable(shortened(super().__str__()))


class ModelError(VisistageError):
    """A checkpoint is unknown, incomplete, corrupt or of an unsupported architecture."""


class PlanError(VisistageError):
    """A stage plan contradicts itself, or does not fit the model."""


class TargetError(VisistageError):
    """A target, precision or option cannot be honoured on this machine or by this version."""


class BundleError(VisistageError):
    """A bundle has a missing, changed or foreign file."""


class EngineError(VisistageError):
    """An engine cannot be compiled, or was compiled for another machine."""


class ParityError(VisistageError):
    """A bundle computes something else than the checkpoint that it was built from."""


class ImageError(VisistageError):
    """An image cannot be read, or would be too large once decoded."""


class ImageSizeError(ImageError):
    """An image has more pixels or bytes than are decoded, or too long a side."""


class ImageFormatError(ImageError):
    """An image is of a format that is not read."""


class PromptError(VisistageError):
    """A prompt, a chat template or a sampling option cannot be used."""


class CapacityError(VisistageError):
    """Slots, memory or disk do not suffice for what was asked."""


class BusyError(VisistageError):
    """An engine takes no more questions now."""


class DataError(VisistageError):
    """A file of samples cannot be read."""


class MissingDependencyError(VisistageError):
    """An optional library is not installed."""


def nearest(word: str, known: tuple[str, ...] | list[str]) -> str:
    """Return ' Did you mean ...?' for the known word closest to ``word``, or nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
