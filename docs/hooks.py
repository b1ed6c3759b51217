"""For mkdocs: what the command line and the settings say of themselves, put into the pages when they are built."""
import os
import re
import subprocess
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def on_page_markdown(markdown: str, **_) -> str:
    markdown = re.sub(r"<!-- help: (\S+) -->", lambda match: help_of(match[1]), markdown)
    return markdown.replace("<!-- settings -->", settings())


def help_of(command: str) -> str:
    said = subprocess.run(["confkd", command, "--help"], env={**os.environ, "COLUMNS": "100"}, capture_output=True, text=True, check=True)
    return f"```text\n{said.stdout.strip()}\n```"


def settings() -> str:
    """README's table, which a test keeps equal to the code."""
    return re.search(r"<!-- settings: .*? -->\n(.*?)\n\n", README.read_text(encoding="utf-8"), re.DOTALL)[1]
