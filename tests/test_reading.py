"""What makes the scripts readable beside their papers, as far as a test can see it."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

import dars
import guidedmix
import mkd
import rml
import three_stage

ROOT = Path(__file__).parent.parent
SCRIPTS = pytest.mark.parametrize(
    "script", [rml, three_stage, mkd, dars, guidedmix], ids=lambda script: script.__name__
)


def comments(source):
    """[(number of the line, text)] of all comments."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [(token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT]


def open_marks(source):
    """The texts of all comments `# Open:`, each with its continuation lines."""
    lines = source.splitlines()
    marks = []
    for number, text in comments(source):
        if text.startswith("# Open:"):
            for line in lines[number:]:
                line = line.strip()
                if not line.startswith("#") or re.match(r"# (Open:|Code:|Eq|\d )", line):
                    break
                text += " " + line.lstrip("# ")
            marks.append(text)
    return marks


def equations(text):
    """The numbers after Eq. and Eqs.: of "Eqs. 1, 3 and 6-8" {1, 3, 6, 7, 8}."""
    numbers = set()
    pattern = r"Eqs?\. (\d+(?:-\d+)?(?:(?:, | and |, and )\d+(?:-\d+)?)*)"
    for listed in re.findall(pattern, text):
        for first, last in re.findall(r"(\d+)(?:-(\d+))?", listed):
            numbers |= set(range(int(first), int(last or first) + 1))
    return numbers


def test_open_marks_and_equations_are_found():
    source = """
x = 1  # Open: the share is not said; .5 is ours   --share
       # and so is --other
# Open: alone
y = 2
"""
    assert open_marks(source) == [
        "# Open: the share is not said; .5 is ours   --share and so is --other",
        "# Open: alone",
    ]
    assert equations("Eqs. 1, 3 and 6-8, Table 2; Eq. 10") == {1, 3, 6, 7, 8, 10}


@pytest.mark.parametrize("folder", ["", "tests"])
def test_no_line_has_more_than_100_columns(folder):
    long = []
    for path in sorted((ROOT / folder).glob("*.py")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if len(line) > 100:
                long.append(f"{path.name}:{number}")
    assert not long


@SCRIPTS
def test_each_open_choice_names_flags_that_exist(script):
    marks = open_marks(Path(script.__file__).read_text())
    assert len(marks) >= 6
    flags = set(script.get_parser()._option_string_actions)
    for mark in marks:
        for flag in re.findall(r"--[a-z][\w-]*", mark):
            assert flag in flags, mark


@SCRIPTS
def test_each_equation_of_the_table_has_its_line(script):
    """An equation that begins a row of the docstring's table is marked in the code: # Eq. 9."""
    source = Path(script.__file__).read_text()
    rows = re.findall(r"^ +(Eqs?\. .+)$", ast.get_docstring(ast.parse(source)), re.M)
    named = set()
    for row in rows:
        named |= equations(re.split(r" {2,}", row)[0])
    marked = set()
    for _, text in comments(source):
        marked |= equations(text)
    assert named
    assert not named - marked
