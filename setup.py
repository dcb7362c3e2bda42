"""Gives package indexes README.md with links that work there; pyproject.toml says everything else of the package."""

import re
import tomllib
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
# [text](target) and ![text](target), unless the target is an address or a place on the page itself.
LINK = re.compile(r"(!?)\[([^][]*)\]\((?![a-z]+:|#)([^)]+)\)")


def with_absolute_links(page: str, repository: str) -> str:
    """The page with its links to files of the repository as addresses."""

    def absolute(link: re.Match[str]) -> str:
        mark, text, target = link.groups()
        return f"{mark}[{text}]({repository}/{'raw' if mark else 'blob'}/main/{target})"

    return LINK.sub(absolute, page)


if __name__ == "__main__":
    project = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    setup(
        long_description=with_absolute_links(readme, project["urls"]["Repository"]),
        long_description_content_type="text/markdown",
    )
