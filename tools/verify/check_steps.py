"""How a rung is tried: what it needs, what it answers, and how it says that it cannot run."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass

from ...graphs.errors import (
    CapacityError,
    DataError,
    ImageError,
    MissingDependencyError,
    PromptError,
    TargetError,
    VisistageError,
)
from .verify_report import FAILED, IMPOSSIBLE, NOTHING, PASSED, CheckRecord, CheckResult


class ImpossibleError(Exception):
    """The rung cannot run on this machine; says why."""


class NothingError(Exception):
    """The bundle holds nothing that the rung could check; says why."""


@dataclass(frozen=True)
class Check:
    """A rung before it is tried; ``needs`` names the modules that it imports."""

    name: str
    compares: str
    rule: str
    run: Callable[[], CheckResult]
    needs: tuple[str, ...] = ()


def run_check(check: Check) -> CheckRecord:
    """Run a step; whatever happens becomes a rung.

    Raises:
        DataError, ImageError, PromptError: it is the prompts that cannot be used.
    """
    started = time.perf_counter()
    result, reason = CheckResult(), ""
    missing = [name for name in check.needs if importlib.util.find_spec(name) is None]
    if missing:
        status = IMPOSSIBLE
        reason = f"{', '.join(missing)} not installed (pip install 'visistage[compile]')"
    else:
        try:
            result = check.run()
            status, reason = (FAILED, result.failure) if result.failure else (PASSED, "")
        except (ImpossibleError, CapacityError, MissingDependencyError, TargetError) as error:
            status, reason = IMPOSSIBLE, str(error)
        except NothingError as error:
            status, reason = NOTHING, str(error)
        except (DataError, ImageError, PromptError):
            raise
        except VisistageError as error:
            status, reason = FAILED, str(error)
        except Exception as error:  # whatever a library says of a file that is not what it claims
            status, reason = FAILED, f"{type(error).__name__}: {error}"
    return CheckRecord(
        name=check.name,
        compares=check.compares,
        rule=check.rule,
        status=status,
        reason=" ".join(reason.split()),  # libraries say it in several lines
        seconds=round(time.perf_counter() - started, 3),
        files=result.files,
        errors=result.errors,
        facts=result.facts,
    )


def skip_check(check: Check, reason: str) -> CheckRecord:
    """A rung that is not tried."""
    return CheckRecord(check.name, check.compares, check.rule, IMPOSSIBLE, reason, 0.0)


def require_memory(what: str, needed: int, free: int) -> None:
    """Refuse what does not fit.

    Raises:
        ImpossibleError: says how much ``what`` needs, and how much is free; bytes.
    """
    if needed > free:
        raise ImpossibleError(
            f"{what} needs {needed / 2**20:.0f} MiB of memory, {free / 2**20:.0f} MiB are free"
        )
