"""Every flag of a method has its value from the table PAPER, so that a row can set it."""

import copy

import pytest

import common
import dars
import guidedmix
import mkd
import rml
import three_stage

SCRIPTS = pytest.mark.parametrize(
    "script", [rml, three_stage, mkd, dars, guidedmix], ids=lambda script: script.__name__
)


def method_flags(script):
    """The actions of the parser's first own group; the groups after it are common.py's."""
    groups = script.get_parser()._action_groups[2:]
    flags = groups[0]._group_actions
    assert groups[1].title == "data" and len(flags) >= 10
    return flags


@SCRIPTS
def test_no_flag_of_a_method_has_a_default_that_a_row_cannot_replace(script):
    fixed = {flag.dest: flag.default for flag in method_flags(script) if flag.default is not None}
    assert not any(fixed.values()), fixed
    assert all(value is False for value in fixed.values())


@SCRIPTS
def test_every_flag_of_a_method_has_a_value_in_paper(script):
    """A value that follows from other flags is in no row; then --help says what it is."""
    named = set().union(*script.PAPER.values())
    for flag in method_flags(script):
        assert flag.dest in named or "default:" in flag.help, flag.dest
    for dataset in script.PAPER.keys() & {"cityscapes", "vocaug"}:
        row = common.parse_args(script.get_parser(), script.PAPER, ["--dataset", dataset])
        for flag in method_flags(script):
            unset = getattr(row, flag.dest) is None
            assert not unset or "default:" in flag.help, (dataset, flag.dest)


@SCRIPTS
@pytest.mark.parametrize("dataset", ["streets", "cityscapes", "vocaug"])
def test_every_flag_of_a_method_is_set_by_a_row_and_the_command_line_goes_first(
    script, dataset, monkeypatch
):
    flags = [flag for flag in method_flags(script) if flag.default is None]
    values = {flag.dest: f"{flag.dest} of the row" for flag in flags}
    paper = {name: row | values for name, row in copy.deepcopy(script.PAPER).items()}
    monkeypatch.setattr(script, "PAPER", paper)
    args = common.parse_args(script.get_parser(), script.PAPER, ["--dataset", dataset])
    assert {name: getattr(args, name) for name in values} == values
    for flag in flags:
        words = [flag.option_strings[0]]
        if flag.nargs != 0:
            choice = next(iter(flag.choices or ["1" if flag.metavar == "N" else "0.5"]))
            words += [str(choice)] * (flag.nargs if isinstance(flag.nargs, int) else 1)
        argv = ["--dataset", dataset, *words]
        args = common.parse_args(script.get_parser(), script.PAPER, argv)
        ours = {name: getattr(args, name) for name in values}
        differs = {name for name in values if ours[name] != values[name]}
        assert differs == {flag.dest}
