"""The commands, links and numbers of lines in README.md and RESULTS.md."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import common
import dars
import guidedmix
import mkd
import rml
import three_stage

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "tests" / "RESULTS.md").read_text()
TEXT = re.sub(r"\\\n\s*", "", README + RESULTS)  # a command may go on in the next line
COMMANDS = re.findall(r"^    ((?:pip|python|torchrun) .+)$", TEXT, re.M)
COMMANDS += re.findall(r"`((?:python|torchrun) [^`]+)`", TEXT)


def test_the_two_commands_stand_on_the_first_screen():
    first = README.splitlines()[:12]
    assert "    pip install -r requirements.txt && python rml.py" in first
    assert "    pip install -r requirements.txt && python -m pytest" in first
    test_command = "pip install -q -r requirements.txt && python -m pytest"
    assert test_command in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize(
    "script, least",
    [(rml, 20), (dars, 14), (three_stage, 10), (mkd, 15), (guidedmix, 12)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_every_command_parses(script, least):
    """The script's parser accepts each command, and the table fills every value."""
    name = f"{script.__name__}.py"
    parsed = 0
    for command in COMMANDS:
        words = shlex.split(command)
        if name in words:
            argv = words[words.index(name) + 1 :]
            args = common.parse_args(script.get_parser(), script.PAPER, argv)
            assert None not in (args.lr, args.crop, args.backbone, args.weights)
            assert args.iterations is not None or args.epochs is not None
            parsed += 1
    assert parsed >= least


def test_commands_of_tests_name_files_and_flags_that_exist():
    """Figures, the table over runs, and benchmarks."""
    names = set()
    for command in COMMANDS:
        if match := re.match(r"python (tests/\w+\.py)(.*)", command):
            path, arguments = match.groups()
            names.add(path)
            source = (ROOT / path).read_text()
            for flag in re.findall(r"--[\w-]+", arguments):
                assert flag in source, command
    assert {"tests/figure_rml.py", "tests/figure_dars.py", "tests/results_table.py"} <= names
    benchmarks = {f"tests/{path.name}" for path in (ROOT / "tests").glob("benchmark_*.py")}
    assert benchmarks <= names


def test_nothing_is_left_to_be_filled_in():
    assert not re.search(r"@[A-Z]+@|^[A-Z]+_[A-Z_]+$", README + RESULTS, re.M)


def test_torchrun_options_exist():
    command = [sys.executable, "-m", "torch.distributed.run", "--help"]
    text = subprocess.run(command, capture_output=True, text=True).stdout.replace("-", "_")
    commands = [command for command in COMMANDS if command.startswith("torchrun")]
    assert len(commands) >= 3
    for command in commands:
        options = re.findall(r"(--[\w-]+)", re.split(r" \w+\.py ", command)[0])
        for option in options:
            assert option.replace("-", "_") in text, option


def test_help_needs_no_data(tmp_path):
    words = {
        "rml.py": ("--mutual", "Table 4"),
        "dars.py": ("--pseudo", "Table 4"),
        "three_stage.py": ("--lambda1", "Table V"),
        "mkd.py": ("--gamma", "Table 4"),
        "guidedmix.py": ("--lambda-cap", "Table 2"),
    }
    running = {}
    for script in words:
        command = [sys.executable, str(ROOT / script), "--help"]
        running[script] = subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.PIPE, text=True
        )
    for script, process in running.items():
        text = process.communicate()[0]
        assert process.returncode == 0
        for word in words[script]:
            assert word in text
    assert not list(tmp_path.iterdir())


def test_no_package_but_the_five_is_imported():
    names = set()
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                names.add(node.module.split(".")[0])
    known = {"torch", "torchvision", "numpy", "PIL", "common"}
    assert not names - set(sys.stdlib_module_names) - known
    packages = (ROOT / "requirements.txt").read_text().split()
    packages = [package.split(">")[0] for package in packages]
    assert packages == ["torch", "torchvision", "numpy", "pillow", "pytest"]


# ---- the documents -------------------------------------------------------------------------------


def anchors(text):
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("folder, text", [(".", README), ("tests", RESULTS)])
def test_links_lead_somewhere(folder, text):
    links = re.findall(r"\]\(([^)]+)\)", text)
    local = [link for link in links if not link.startswith("http")]
    assert local
    for link in local:
        path, _, anchor = link.partition("#")
        target = ROOT / folder / path if path else None
        assert target is None or target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text() if target else text), link


def test_the_documents_are_short_enough_to_read():
    assert len(README.splitlines()) <= 200
    for name, text in (("README.md", README), ("RESULTS.md", RESULTS)):
        for number, line in enumerate(text.splitlines(), 1):
            assert len(line) <= 120 or line.startswith("|"), f"{name}:{number}"


def test_the_pictures_are_small():
    pictures = list((ROOT / "tests" / "pictures").iterdir())
    assert sum(path.stat().st_size for path in pictures) < 200_000
    for path in pictures:
        assert f"tests/pictures/{path.name}" in README
