"""tests/fair_comparison.py: what it runs, what it leaves alone, and its table."""

import json
import sys

import fair_comparison
import pytest

import common

# A stand-in for a script: it writes the result that its arguments make, or fails.
SCRIPT = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
seed = int(sys.argv[sys.argv.index("--seed") + 1])
if "fail" in sys.argv:
    sys.exit("error: no such data")
miou = 40 + seed + (0 if "--supervised" in sys.argv else 3 * seed)
result = {"miou": {"student": miou}, "headline": "student", "seconds": 90, "peak_memory_mb": 700}
(folder / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture
def compare(tmp_path, monkeypatch, capsys):
    """compare("--seeds", "0", ..) -> what is printed, the table file's text."""
    for method in fair_comparison.METHODS:
        (tmp_path / f"{method}.py").write_text(SCRIPT)
    monkeypatch.setattr(fair_comparison, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["fair_comparison.py", *argv])
        fair_comparison.main()
        return capsys.readouterr().out, (tmp_path / "runs/fair/table-12.md").read_text()

    return run


def test_the_table_has_mean_deviation_and_gain_over_the_seeds(compare):
    out, table = compare("--methods", "rml", "--seeds", "1", "2", "3")
    row = table.splitlines()[2]
    assert row == (
        "| Robust Mutual Learning | 42.0 ± 1.0 | 48.0 ± 4.0 | +6.0 ± 3.0 | 1 2 3 | 2, 2 | 700 |"
    )
    assert table in out and out.count("mIoU,") == 6


def test_finished_runs_are_left_alone_and_the_rest_is_run(compare, tmp_path):
    compare("--methods", "mkd", "--seeds", "0")
    path = tmp_path / "runs/fair/mkd-12/method-s0/result.json"
    result = json.loads(path.read_text()) | {"miou": {"student": 12.5}}
    path.write_text(json.dumps(result))
    out, table = compare("--methods", "mkd", "dars", "--seeds", "0")
    assert out.count("(was finished before)") == 2 and "12.5" in table
    assert "| DARS | 40.0 | 40.0 | +0.0 | 0 |" in table


def test_a_failed_run_is_named_and_the_others_go_on(compare, tmp_path, capsys):
    (tmp_path / "rml.py").write_text("import sys; sys.exit('error: no such data')")
    with pytest.raises(common.UserError, match="2 runs are not finished"):
        compare("--methods", "rml", "dars", "--seeds", "0")
    out = capsys.readouterr().out
    assert "rml-12/method-s0: status 1: error: no such data" in out
    assert "| Robust Mutual Learning | | | not finished | | | |" in out and "| DARS | 40.0" in out


def test_more_arguments_go_to_every_script(compare):
    argv = "--methods rml --labels 46 --seeds 0 --data-root D -- --preset tiny".split()
    args = fair_comparison.get_parser().parse_args(argv)
    words = fair_comparison.command(args, "rml", True, 0)
    assert (
        words[2:]
        == (
            "--dataset camvid --labels 46 --seed 0 --data-root D --supervised "
            "--out runs/fair/rml-46/supervised-s0 --preset tiny"
        ).split()
    )
