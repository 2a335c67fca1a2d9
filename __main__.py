"""``python -m visistage``: the command line without its script."""

import sys

if not getattr(sys.flags, "safe_path", False):
    del sys.path[0]  # the working directory, which may hold modules named as those we import

from .cli.main import main

main(prog_name="visistage")
