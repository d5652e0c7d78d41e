"""How the documentation is built: `make docs`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from sphinx.ext import napoleon
from sphinx.ext.napoleon import GoogleDocstring
from sphinx.util.parallel import make_chunks

import mechedit
from mechedit.data.downloads import cache_folder

# The pages show what a reader sees, whatever settings were tuned on this machine.
os.environ["MECHEDIT_TUNED"] = os.path.join(os.devnull, "tuned")

HERE = Path(__file__).parent
NOTEBOOKS = HERE.parent / "notebooks"

project = "mechedit"
author = "the mechedit authors"
copyright = f"2026, {author}"
version = release = mechedit.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "jupyter_execute"]
nitpicky = False
# Annotations such as `object` are not the attributes of that name.
suppress_warnings = ["ref.python"]
html_theme = "furo"
html_title = "mechedit"
html_static_path = ["images"]
html_css_files = ["tables.css"]

myst_enable_extensions = ["dollarmath", "deflist", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "force"
# One notebook is about a pretrained model: without it the page shows the cells alone.
REAL_MODELS = Path(os.environ.get("MECHEDIT_REAL_MODELS") or cache_folder() / "real_models")
nb_execution_excludepatterns = [] if (REAL_MODELS / "smollm2-135m").is_dir() else ["**/5_a_real_model*"]
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True
# Progress bars go to stderr and are of no use on a page.
nb_output_stderr = "remove"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
default_role = "code"


def copy_notebooks(app: Any) -> None:
    """Put the notebooks beside the pages, where Sphinx looks for them."""
    folder = HERE / "notebooks"
    folder.mkdir(exist_ok=True)
    for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
        shutil.copyfile(notebook, folder / notebook.name)


def write_command_line(app: Any) -> None:
    """Generate the page of the command line from the commands themselves."""
    page = HERE / "reference" / "command_line.md"
    command = [sys.executable, "-m", "typer", "mechedit.cli", "utils", "docs", "--name", "mechedit"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    page.write_text(INTRODUCTION + text.partition("\n")[2].lstrip(), encoding="utf-8")


INTRODUCTION = """\
# The command line

Every command takes `--config FILE`, a YAML or JSON file with the same option names; what stands on the command line
wins. Progress goes to stderr. The exit code is 0 on success, 2 with one line on bad input, 3 when no layers are
selected (the facts show no early site) or the choice is unsettled (`--accept-unsettled` takes it), and 130 when
interrupted: the same command then goes on from what is finished.

"""


def plain_to_rst(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turn a docstring that is written as plain text with Markdown's backticks into reStructuredText.

    Indented blocks (equations, small tables) become literal ones; lists, and sections such as `Args:`, stay.
    """
    result: list[str] = []
    literal = listed = section = False
    borders = 0
    for line in lines:
        indented, text = line.startswith(" "), line.strip()
        border = re.fullmatch(r"=+( +=+)+", text) is not None
        if border or borders % 3:  # a table, which has three borders
            borders += border
            result.append(line)
            continue
        if text in ("Example:", "Examples:"):
            result += [".. rubric:: Example", "", ".. code-block:: python", ""]
            literal, listed, section = True, False, False
            continue
        if text and not indented:
            if literal and result[-1].strip():
                result.append("")
            literal = False
            listed = bool(re.match(r"([-*]|\d+\.) ", text)) or (listed and bool(result) and bool(result[-1].strip()))
            section = text in SECTIONS
        elif text and not (literal or listed or section):
            result += ["", ".. code-block:: text", ""]
            literal = True
        result.append("   " + line if literal and text else line if literal else escaped(line))
    if what not in ("attribute", "data", "property"):  # there, what stands before a colon would be taken for a type
        result = GoogleDocstring(result, NAPOLEON, app, what, name, obj, options).lines()
    lines[:] = result


NAPOLEON = napoleon.Config(napoleon_use_rtype=False)
SECTIONS = ("Args:", "Returns:", "Raises:", "Yields:", "Attributes:", "Note:")


def escaped(line: str) -> str:
    """A line of text with what reStructuredText would read as markup escaped: not within backticks, nor *emphasis*."""
    parts = line.split("`")
    for index in range(0, len(parts), 2):
        parts[index] = MARKUP.sub(lambda match: match[0] if len(match[0]) > 1 else "\\" + match[0], parts[index])
    return "`".join(parts)


MARKUP = re.compile(r"(?<![\w*])\*[A-Za-z][\w -]*\*(?![\w*])|(?<=\w)_(?!\w)|[*|]")


def deal_pages(app: Any, env: Any, pages: list[str]) -> None:
    """Order the pages so that two processes, which read them in runs of like length, execute about as long.

    The notebook about a pretrained model takes as long as the four others together; the rest are short.
    """
    size = len(make_chunks(pages, app.parallel)[0]) if app.parallel > 1 else len(pages)
    executed = [page for page in pages if "code-cell" in env.doc2path(page).read_text(encoding="utf-8")]
    notebooks = [page for page in pages if page.startswith("notebooks/")]
    plain = [page for page in pages if page not in {*executed, *notebooks}]
    first = [*notebooks[-1:], *executed[::2]]
    filling = max(size - len(first), 0)
    pages[:] = [*first, *plain[:filling], *notebooks[:-1], *executed[1::2], *plain[filling:]]


def setup(app: Any) -> None:
    """Connect what is generated."""
    app.connect("builder-inited", copy_notebooks)
    app.connect("builder-inited", write_command_line)
    app.connect("env-before-read-docs", deal_pages)
    app.connect("autodoc-process-docstring", plain_to_rst)
