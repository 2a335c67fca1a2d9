"""Child processes that run a module of ours and import nothing from where the user stands.

Python looks for modules in the working directory first. That may be a bundle of a stranger, or a
folder of downloads, with a ``ctypes.py`` in it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

_ROOT = Path(__file__).absolute().parents[1]
_RUN = """
import sys
sys.path[:] = [entry for entry in sys.path if entry]
from importlib import import_module, util
name, root, module = sys.argv[1:]
spec = util.spec_from_file_location(name, root + "/__init__.py", submodule_search_locations=[root])
package = sys.modules[name] = util.module_from_spec(spec)
spec.loader.exec_module(package)
import_module(name + "." + module).main()
"""
"""The package is taken from its own folder: the one that holds it may be the working directory."""


@contextmanager
def isolated(module: str) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Yield command and options of ``subprocess.Popen`` that call ``main()`` of ``module``.

    The child has a working directory of its own, which lives as long as the context, so names of
    files in its job must be absolute. It finds the libraries that this process finds.
    """
    package, _, rest = module.partition(".")
    safe = ("-P",) if sys.version_info >= (3, 11) else ()
    with TemporaryDirectory(prefix="visistage-") as own:
        command = [sys.executable, *safe, "-c", _RUN, package, str(_ROOT), rest]
        folders = os.pathsep.join(_library_folders())
        yield command, {"cwd": own, "env": {**os.environ, "PYTHONPATH": folders}}


def _library_folders() -> list[str]:
    """Return where this process finds libraries, without the place that it was started in."""
    unsafe = {os.path.realpath(os.getcwd())}
    if not getattr(sys.flags, "safe_path", False) and "-packages" not in sys.path[0]:
        unsafe.add(os.path.realpath(sys.path[0]))  # of a script, or of ``python -m``
    found = (entry for entry in sys.path if os.path.isabs(entry))
    return [entry for entry in found if os.path.realpath(entry) not in unsafe]
