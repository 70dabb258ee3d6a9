"""The README's commands are commands that exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import common
import dars
import guidedmix
import mkd
import rml
import three_stage

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^    ((?:pip|python|torchrun) .+)$", README, re.M) + re.findall(
    r"`(python [^`]+)`", README
)


def test_the_two_commands_stand_on_the_first_screen():
    first = README.splitlines()[:12]
    assert "    pip install -r requirements.txt && python rml.py" in first
    assert "    pip install -r requirements.txt && python -m pytest" in first
    assert (
        "pip install -q -r requirements.txt && python -m pytest"
        in (ROOT / ".ci" / "run").read_text()
    )


def test_every_command_parses():
    """Every command line of a script is accepted by its parser, with every value filled from the table."""
    for script, least in ((rml, 12), (dars, 12), (three_stage, 8), (mkd, 12), (guidedmix, 8)):
        parsed, name = 0, script.__name__ + ".py"
        for command in COMMANDS:
            words = shlex.split(command)
            if name in words and "venv" not in command:
                args = common.parse_args(
                    script.get_parser(), script.PAPER, words[words.index(name) + 1 :]
                )
                assert None not in (args.lr, args.crop, args.backbone, args.weights)
                assert args.iterations is not None or args.epochs is not None
                parsed += 1
        assert parsed >= least
    assert not re.search(
        r"@[A-Z]+@|^[A-Z]+_[A-Z_]+$", README, re.M
    )  # nothing is left to be filled in


def test_torchrun_options_exist():
    text = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--help"], capture_output=True, text=True
    ).stdout.replace("-", "_")
    for command in COMMANDS:
        if command.startswith("torchrun"):
            for option in re.findall(r"(--[\w-]+)", re.split(r" \w+\.py ", command)[0]):
                assert option.replace("-", "_") in text, option


def test_help_needs_no_data(tmp_path):
    told = {
        "rml.py": ("--mutual", "Table 4"),
        "dars.py": ("--pseudo", "Table 4"),
        "three_stage.py": ("--lambda1", "Table V"),
        "mkd.py": ("--gamma", "Table 4"),
        "guidedmix.py": ("--lambda-cap", "Table 2"),
    }
    running = {
        script: subprocess.Popen(
            [sys.executable, str(ROOT / script), "--help"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            text=True,
        )
        for script in told
    }
    for script, process in running.items():
        text = process.communicate()[0]
        assert process.returncode == 0 and all(words in text for words in told[script])
    assert not list(tmp_path.iterdir())


def test_no_package_but_the_five_is_imported():
    names = set()
    for path in ROOT.glob("*.py"):
        names |= set(re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), re.M))
    foreign = (
        names - set(sys.stdlib_module_names) - {"torch", "torchvision", "numpy", "PIL", "common"}
    )
    assert not foreign
    assert [line.split(">")[0] for line in (ROOT / "requirements.txt").read_text().split()] == [
        "torch",
        "torchvision",
        "numpy",
        "pillow",
        "pytest",
    ]
