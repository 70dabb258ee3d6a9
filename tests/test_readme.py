"""The README's commands are commands that exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import common
import rml

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^    ((?:pip|python|torchrun) .+)$", README, re.M) + re.findall(r"`(python [^`]+)`", README)


def test_the_two_commands_stand_on_the_first_screen():
    first = README.splitlines()[:12]
    assert "    pip install -r requirements.txt && python rml.py" in first
    assert "    pip install -r requirements.txt && python -m pytest" in first
    assert "pip install -q -r requirements.txt && python -m pytest" in (ROOT / ".ci" / "run").read_text()


def test_every_command_parses():
    """Every rml.py command line is accepted by the parser, with every value filled from the table."""
    parsed = 0
    for command in COMMANDS:
        words = shlex.split(command)
        if "rml.py" in words and "venv" not in command:
            args = common.parse_args(rml.get_parser(), rml.PAPER, words[words.index("rml.py") + 1:])
            assert None not in (args.lr, args.iterations, args.crop, args.backbone, args.weights)
            parsed += 1
    assert parsed >= 12
    assert not re.search(r"@[A-Z]+@", README)


def test_torchrun_options_exist():
    text = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--help"], capture_output=True, text=True).stdout.replace("-", "_")
    for command in COMMANDS:
        if command.startswith("torchrun"):
            for option in re.findall(r"(--[\w-]+)", command.split(" rml.py ")[0]):
                assert option.replace("-", "_") in text, option


def test_help_needs_no_data(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "rml.py"), "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "--mutual" in done.stdout and "Table 4" in done.stdout
    assert not list(tmp_path.iterdir())


def test_no_package_but_the_five_is_imported():
    names = set()
    for path in ROOT.glob("*.py"):
        names |= set(re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), re.M))
    foreign = names - set(sys.stdlib_module_names) - {"torch", "torchvision", "numpy", "PIL", "common"}
    assert not foreign
    assert [line.split(">")[0] for line in (ROOT / "requirements.txt").read_text().split()] == ["torch", "torchvision", "numpy", "pillow", "pytest"]
