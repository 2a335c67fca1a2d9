"""The README of an index's page, whose links lead into the repository from anywhere.

Everything else about the package is in pyproject.toml.
"""

import re
from pathlib import Path

from setuptools import setup

REPOSITORY = "https://github.com/visistage/visistage"
RAW = "https://raw.githubusercontent.com/visistage/visistage/main"
RELATIVE = r"(?![a-z]+:|#)"


def absolute(text: str) -> str:
    """Return Markdown whose relative links, of images too, have become addresses."""
    text = re.sub(rf"(!\[[^\]]*\]\(){RELATIVE}", rf"\g<1>{RAW}/", text)
    return re.sub(rf"(\]\(){RELATIVE}", rf"\g<1>{REPOSITORY}/blob/main/", text)


if __name__ == "__main__":
    readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    setup(
        script_name="setup.py",  # by which setuptools leaves this file out of the wheel
        long_description=absolute(readme),
        long_description_content_type="text/markdown",
    )
