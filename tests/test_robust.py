"""What people do to a run: processes, folders, sizes and streams that nobody planned for."""

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import common
import dars
import guidedmix
import mkd
import rml
import three_stage
from helpers import run_on_few_streets, two_processes

ROOT = Path(__file__).parent.parent
# A supervised run of two steps.
SHORT = "--supervised --labels 4 --stage0-iterations 2 --iterations 0 --batch-size 2 --crop 32 32"
SHORT = SHORT.split()


def start(*argv):
    run_on_few_streets(rml, *SHORT, *argv)


# ---- processes -----------------------------------------------------------------------------------

TORCHRUN = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def test_slurm_tasks_without_ranks_do_not_train_alone(error, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    message = error()
    assert "SLURM_NTASKS" in message and "4 tasks" in message
    assert "srun --ntasks=1 torchrun --nproc_per_node=4" in message


def test_one_slurm_task_is_a_run(main, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "1")
    main("--out", "run")
    assert Path("run/result.json").exists()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"WORLD_SIZE": None}, ["WORLD_SIZE", "torchrun"]),
        ({"RANK": None}, ["RANK", "torchrun"]),
        ({"MASTER_ADDR": None}, ["MASTER_ADDR", "torchrun"]),
        ({"RANK": "5"}, ["RANK=5", "WORLD_SIZE=2"]),
        ({"RANK": "one"}, ["RANK=one"]),
        ({"MASTER_PORT": "abc"}, ["MASTER_PORT=abc", "cannot meet"]),
        ({"MASTER_PORT": "22222222"}, ["MASTER_PORT=22222222", "cannot meet"]),
    ],
)
def test_an_environment_that_torchrun_never_makes(error, monkeypatch, changes, words):
    for name, value in (TORCHRUN | changes).items():
        if value is not None:
            monkeypatch.setenv(name, value)
    message = error()
    assert all(word in message for word in words)


# ---- two runs in one folder ----------------------------------------------------------------------


def test_a_folder_that_another_process_writes_into(error, main):
    """The line names the process, nothing changes; and when it is killed its lock is free."""
    code = "import common, sys, pathlib; lock = common.lock(pathlib.Path('run')); input()"
    Path("run").mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", f"{code}"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
    )
    try:
        while not Path("run/lock").exists() or not Path("run/lock").read_text():
            assert other.poll() is None
        for more in ([], ["--overwrite"]):
            message = error("--out", "run", *more)
            assert f"process {other.pid} on " in message and "--out" in message
        assert [path.name for path in Path("run").iterdir()] == ["lock"]
    finally:
        other.kill()
        other.wait()
    main("--out", "run")
    assert Path("run/result.json").exists()
    assert Path("run/lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_file_system_without_locks_is_no_obstacle(main, monkeypatch):
    def unsupported(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(common.fcntl, "lockf", unsupported)
    main("--out", "run")
    assert Path("run/result.json").exists()


# ---- every network of every script on several processes ------------------------------------------

SCRIPTS = [rml, three_stage, mkd, dars, guidedmix]
# A step of each loop of a script.
ONE_STEP = {
    rml: "--stage0-iterations 1 --iterations 1 --stages 1",
    three_stage: "--stage1-iterations 1 --iterations 1 --stages 2 --stage1-batch-size 2 "
    "--labeled-batch-size 2",
    mkd: "--warmup 1 --iterations 2",
    dars: "--round0-iterations 1 --iterations 1 --rounds 1 --round0-batch-size 2",
    guidedmix: "--warmup 1 --iterations 2",
}


def choices(script, name):
    """What --network or --backbone may be."""
    action = script.get_parser()._option_string_actions[name]
    if name == "--backbone":
        return [choice for choice in BACKBONES if choice in (action.choices or BACKBONES)]
    return action.choices or action.help.split("; two")[0].split(", ")


BACKBONES = ["tiny", "resnet50", "vit_b_16", "efficientnet_lite0"]  # others have the same parts


@pytest.fixture
def shallow(monkeypatch):
    """Real backbones, of one block a layer and narrow: what a network is made of stays."""

    class Narrow(common.ResNet):
        def __init__(self, block, depths, norm, slim=1, *more, **options):
            super().__init__(block, depths, norm, 8, *more, **options)

    monkeypatch.setattr(common, "ResNet", Narrow)
    monkeypatch.setitem(common.RESNETS, "resnet50", (1, 1, 1, 1))
    monkeypatch.setitem(common.VITS, "vit_b_16", (16, 1, 4, 64))


PAIRS = []
for script in SCRIPTS:
    for network in choices(script, "--network"):
        for backbone in choices(script, "--backbone"):
            PAIRS.append((script, network, backbone))
PAIRS.append((rml, "pspnet,setr", "tiny"))


@pytest.mark.parametrize(
    "script, network, backbone", PAIRS, ids=lambda value: getattr(value, "__name__", value)
)
def test_all_that_is_trained_gets_a_gradient(
    main, shallow, monkeypatch, script, network, backbone
):
    """As DistributedDataParallel demands of each network in it; or the pair is refused."""
    networks, steps = [], []
    real = torch.amp.GradScaler.step

    def parallel(network, device):
        networks.append(network)
        return network

    def step(scaler, optimizer):
        for network in networks:
            names = [n for n, p in network.named_parameters() if p.requires_grad and p.grad is None]
            assert not names
        steps.append(networks)
        return real(scaler, optimizer)

    monkeypatch.setattr(common, "parallel", parallel)
    monkeypatch.setattr(common, "evaluate", lambda networks, *_: dict.fromkeys(networks, TABLE))
    monkeypatch.setattr(common.Run, "picture", lambda *_: None)
    monkeypatch.setattr(common.Run, "draw_predictions", lambda *_: None)
    monkeypatch.setattr(torch.amp.GradScaler, "step", step)
    pair = f"--network {network} --backbone {backbone} --weights none --batch-norm train"
    if script is mkd and network == "deeplabv2":
        pair += " --head bottleneck"  # the features that MKD augments
    argv = f"{ONE_STEP[script]} {pair} --labels 4 --batch-size 2 --crop 32 32 --log-every 9"
    try:
        run_on_few_streets(script, *argv.split())
    except common.UserError as error:
        assert "sits on one of" in str(error)
    else:
        assert len(steps) >= 2


TABLE = torch.eye(10, dtype=torch.int64)


def test_pspnet_on_two_processes(main):
    argv = f"{ONE_STEP[rml]} --labels 4 --batch-size 2 --network pspnet,deeplabv2".split()
    processes = two_processes(rml, Path(), *argv)
    outputs = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs


# ---- checkpoints of others, and broken ones of our own -------------------------------------------


class Pickled(torch.nn.Module):
    """A whole network in a file, as torch.save(model) writes it."""

    def __init__(self):
        super().__init__()
        self.backbone = common.make_backbone("tiny")


def tiny_weights(prefix=""):
    return {prefix + key: value for key, value in common.make_backbone("tiny").state_dict().items()}


OTHERS = {
    "a numpy number": lambda: {"state_dict": tiny_weights(), "miou": np.float64(71.2)},
    "a Namespace": lambda: {"model": tiny_weights(), "args": argparse.Namespace(lr=0.1)},
    "a numpy number among tensors": lambda: tiny_weights() | {"best": np.float64(3)},
    "a network": Pickled,
    "a network in a dict": lambda: {"model": Pickled(), "epoch": 3},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_checkpoint_with_more_than_tensors_and_the_command_that_saves_it_again(main, kind):
    torch.save(OTHERS[kind](), "other.pth")
    with pytest.raises(common.UserError) as error:
        common.load_torch("other.pth")
    message = str(error.value)
    assert "\n" not in message and "other.pth" in message and "download" not in message
    assert re.search(r"holds (numpy|argparse.Namespace|test_robust.Pickled)", message)
    code = re.search(r'python -c "(.+)"$', message)[1]
    exec(code, {})
    args = common.parse_args(
        rml.get_parser(), rml.PAPER, ["--backbone", "tiny", "--weights", "weights.pth"]
    )
    weights, _, _ = common.read_weights(args)
    assert {f"backbone.{key}" for key in tiny_weights()} <= weights.keys()


def test_torchscript_and_safetensors_are_named(main):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), "script.pt")
    Path("x.safetensors").write_bytes(b"\x50\0\0\0\0\0\0\0{}")
    for name, word in (("script.pt", "TorchScript"), ("x.safetensors", "safetensors")):
        with pytest.raises(common.UserError, match=word):
            common.load_torch(name)


@pytest.mark.parametrize(
    "prefix", ["", "backbone.", "encoder.", "module.model.", "_orig_mod.module.", "model.backbone."]
)
def test_prefixes_of_a_backbone_are_dropped(prefix):
    state = tiny_weights(prefix) | {"decode_head.conv_seg.weight": torch.zeros(2)}
    weights, _ = common.convert_weights(state)
    assert {key for key in weights if not key.startswith("skipped.")} == set(
        tiny_weights("backbone.")
    )


def test_torchvisions_segmentation_networks_and_vits_load():
    whole = torchvision.models.segmentation.deeplabv3_resnet50(
        weights=None, weights_backbone=None
    ).state_dict()
    weights, style = common.convert_weights(whole)
    network = SimpleNamespace(state_dict=lambda: {}, spec={"backbone": "resnet50"})
    ours = common.make_backbone("resnet50").state_dict()
    network.state_dict = lambda: {f"backbone.{key}": value for key, value in ours.items()}
    network.load_state_dict = lambda fits, strict: fits
    assert "missing 0" in common.load_weights(network, weights, "file") and style == "torchvision"
    vit = common.ViT(*common.VITS["tiny"]).state_dict()
    for prefix in ("", "module.", "encoder.", "backbone.encoder."):
        found, _ = common.convert_weights({prefix + key: value for key, value in vit.items()})
        assert found.keys() == {f"backbone.{key}" for key in vit}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The run folder of a run that was killed after its first step of two."""
    folder = tmp_path_factory.mktemp("checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        start("--out", "run")
    state = torch.load(folder / "run/last.pt", weights_only=True)
    torch.save(state | {"step": 1, "iteration": 1}, folder / "run/last.pt")
    (folder / "run/result.json").unlink()
    return folder / "run"


ENTRIES = """method headline dataset stage iteration step seconds peak_memory_mb classes models
networks size crop base_size flip student_1 optimizer_1 scaler""".split()
USES = ["", "--evaluate --checkpoint run", "--predict picture.png --checkpoint run"]
USES.append("--weights run/last.pt --out new")


@pytest.mark.parametrize("use", USES)
def test_our_own_checkpoint_without_an_entry(main, checkpoint, monkeypatch, use):
    """Either it is not needed, or one line names the file."""
    monkeypatch.setattr(common, "evaluate", lambda networks, *_: dict.fromkeys(networks, TABLE))
    monkeypatch.setattr(common.Run, "picture", lambda *_: None)
    monkeypatch.setattr(common.Run, "draw_predictions", lambda *_: None)
    Image.new("RGB", (32, 32)).save("picture.png")
    for entry in ["models", "networks", "headline"] if "--weights" in use else ENTRIES:
        wrong = entry in ("models", "networks", "classes", "size", "step")
        for value in (None, "lost") if wrong else (None,):
            shutil.rmtree("run", ignore_errors=True)
            shutil.rmtree("new", ignore_errors=True)
            shutil.copytree(checkpoint, "run")
            state = torch.load("run/last.pt", weights_only=True)
            parts = [state]
            if entry == "student_1":
                parts = [state["models"], state["networks"]]
            for part in parts:
                del part[entry]
                if value:
                    part[entry] = value
            torch.save(state, "run/last.pt")
            try:
                main(*(use.split() or ["--out", "run"]))
            except common.UserError as error:
                assert "run/last.pt" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"method": "dars"}, ["dars", "rml-supervised", "--overwrite"]),
        ({"stage": 7}, ["another run", "--overwrite"]),
        ({"models": {"student_1": {"x": torch.zeros(1)}}}, ["something else", "--overwrite"]),
    ],
)
def test_the_checkpoint_of_another_script_in_a_run_folder(error, checkpoint, changes, words):
    shutil.copytree(checkpoint, "run")
    (Path("run") / "args.json").unlink()
    state = torch.load("run/last.pt", weights_only=True)
    torch.save(state | changes, "run/last.pt")
    message = error("--out", "run")
    assert all(word in message for word in ["run/last.pt", *words])


# ---- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    """--scale inf inf;--scale 0.001 1;--scale 1 1e30;--scale nan 1;--scales 1e-9;--scales 200;
    --scales inf;--base-size 100000000000000000000;--size 99999999 99999999;--crop 70000 1;
    --batch-size 5000;--batch-size 100000000000000000000;--seed 100000000000000000000;
    --split-seed -1;--iterations 100000000000000000000;--workers 100000;--lr inf;--lr nan;
    --weight-decay inf;--stages 100000000000000000000;--stages 5000;--save-every 1e9;
    --log-every 100000000000000000000;--dropout nan;--stage0-lr inf;
    --stage0-iterations 100000000000000000000""".split(";"),
)
def test_a_number_that_nobody_can_mean(error, argv):
    flag = argv.split()[0]
    assert flag in error(*argv.split())


def test_a_range_of_scales_that_a_round_makes(main):
    with pytest.raises(common.UserError, match="--beta-max inf"):
        run_on_few_streets(dars, "--beta-max", "inf", "0.1", "--labels", "4")


@pytest.mark.parametrize(
    "argv, flags",
    [
        ("--size 60000 60000 --batch-size 2", "--size 60000"),
        ("--batch-size 60 --size 30000 30000 --crop 30000 30000", "--batch-size 60 --crop"),
        ("--size 4000 4000 --scales 8 8 --base-size 60000", "--base-size 60000"),
    ],
)
def test_what_cannot_fit_into_the_memory_is_not_tried(monkeypatch, argv, flags):
    monkeypatch.setattr(common.os, "sysconf", lambda name: 2**18, raising=False)  # 64 GB
    args = common.parse_args(rml.get_parser(), rml.PAPER, argv.split())
    with pytest.raises(common.UserError, match=re.escape(flags)):
        common.check_memory(args, torch.device("cpu"))


def test_every_row_of_the_tables_fits_into_a_small_machine(monkeypatch):
    monkeypatch.setattr(common.os, "sysconf", lambda name: 2**17, raising=False)  # 16 GB
    for script in SCRIPTS:
        for name in script.PAPER:
            dataset, _, preset = name.split("/")[0].partition("-")
            argv = ["--dataset", dataset, *(["--preset", preset] if preset else [])]
            args = common.parse_args(script.get_parser(), script.PAPER, argv)
            common.check_memory(args, torch.device("cpu"))


def test_predict_of_a_strip(main, checkpoint):
    """At the height of the training pictures it would be a million pixels wide."""
    for width, height in ((20000, 1), (1, 20000)):
        Image.new("RGB", (width, height)).save("strip.png")
        run_on_few_streets(rml, "--predict", "strip.png", "--checkpoint", str(checkpoint))
        assert Image.open("predictions/strip.png").size == (width, height)


# ---- streams -------------------------------------------------------------------------------------

CODE = """import common, helpers, rml
common.Streets = helpers.FewStreets
real = common.Dataset.__post_init__
def rename(data):
    real(data)
    data.names[0] = chr(0x9053) + chr(0x8def)
common.Dataset.__post_init__ = rename
common.run_main(rml.main)
"""


@pytest.mark.parametrize("redirect", ["> /dev/full", "| head -1", ">&- 2>&-"])
def test_a_run_whose_output_goes_nowhere_is_a_run(main, redirect):
    argv = f"{' '.join(SHORT)} --out run"
    Path("script.py").write_text(CODE)
    command = f"set -o pipefail; {sys.executable} script.py {argv} {redirect}"
    paths = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    env = os.environ | {"PYTHONPATH": paths, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr and "Exception" not in done.stderr
    assert Path("run/result.json").exists()


def test_a_stream_of_ascii_takes_any_text():
    stream = common.Output(io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    print("\u9053\u8def", file=stream, flush=True)
    assert stream.stream.buffer.getvalue() == b"\\u9053\\u8def\n"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_help_needs_no_docstring(script, monkeypatch):
    """python -OO drops it."""
    monkeypatch.setattr(script, "__doc__", None)
    assert "--dataset" in script.get_parser().format_help()


# ---- flags without an effect ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, argv, flag",
    [
        (three_stage, "--supervised --lambda1 2", "--lambda1"),
        (mkd, "--features none --lambda0 2", "--lambda0"),
        (rml, "--supervised --threshold 0.5", "--threshold"),
        (guidedmix, "--supervised --omega 2", "--omega"),
        (dars, "--supervised --temperature 2", "--temperature"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_flag_without_effect_is_named(main, capsys, script, argv, flag):
    base = f"{ONE_STEP[script]} --labels 4 --batch-size 2 --crop 32 32 --lr 0.001"
    run_on_few_streets(script, *f"{base} {argv} --out run".split())
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "no effect" in line]
    assert flag in line and "--labels" not in line and "--crop" not in line


# ---- loader processes, full disks, and going on --------------------------------------------------


@pytest.mark.parametrize(
    "error, word",
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), "--shm-size"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "--workers 0"),
        (RuntimeError("unable to open shared memory object </torch_1> (24)"), "ulimit -n"),
        (RuntimeError("received 0 items of ancdata"), "--workers 0"),
        (OSError(24, "Too many open files"), "ulimit -n"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "--crop"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried ..\nmore"), "--precision bf16"),
        (MemoryError(), "memory is full"),
    ],
)
def test_what_torch_says_becomes_one_line(monkeypatch, capsys, error, word):
    def fail():
        raise error

    prepare_run_main(monkeypatch)
    with pytest.raises(SystemExit) as end:
        common.run_main(fail)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and word in said


class System:
    """The module os, but run_main() ends the command and not the tests (nor their children)."""

    def __getattr__(self, name):
        return getattr(os, name)

    def _exit(self, status):
        sys.exit(status)


def prepare_run_main(monkeypatch):
    """run_main() replaces the streams, and ends the process."""
    monkeypatch.setattr(common, "os", System())
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))


def test_other_errors_keep_their_traceback(monkeypatch):
    prepare_run_main(monkeypatch)
    with pytest.raises(ZeroDivisionError):
        common.run_main(lambda: 1 / 0)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        common.run_main(lambda: (_ for _ in ()).throw(RuntimeError("a fault of ours")))


def test_a_full_disk_while_predicting_names_what_is_missing(error, checkpoint, monkeypatch):
    for name in ("a", "b", "c"):
        Path("photos").mkdir(exist_ok=True)
        Image.new("RGB", (32, 32)).save(f"photos/{name}.png")
    real = common.write_atomically

    def write(path, save):
        if path.name == "b_overlay.png":
            raise OSError(28, "No space left on device")
        real(path, save)

    monkeypatch.setattr(common, "write_atomically", write)
    message = error("--predict", "photos", "--checkpoint", str(checkpoint))
    assert "b_overlay.png" in message and "No space left" in message
    assert "1 of 3" in message and "photos/b.png" in message


def test_a_run_says_its_device_first(main, capsys):
    main("--out", "run")
    assert capsys.readouterr().out.startswith("device    CPU")


def test_a_finished_run_says_how_it_is_lengthened(error, main):
    main("--out", "run")
    message = error("--out", "run")
    assert "--out NEW --weights run/last.pt" in message


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_finished_run_goes_on_in_a_new_one(main, capsys, script):
    """Each student begins with the weights of its own."""
    argv = f"{ONE_STEP[script]} --labels 4 --batch-size 2 --crop 32 32".split()
    run_on_few_streets(script, *argv, "--out", "run")
    run_on_few_streets(script, *argv, "--out", "new", "--weights", "run/last.pt")
    assert "missing 0" in capsys.readouterr().out


def test_a_picture_that_was_added_or_is_gone_is_named(main, error, checkpoint, monkeypatch):
    for name, words in (("train_0003", ["new"]), ("train_0009", ["missing", "copy it back"])):
        shutil.rmtree("run", ignore_errors=True)
        shutil.copytree(checkpoint, "run")
        record = json.loads(Path("run/args.json").read_text())
        if "new" in words:
            for part in ("labeled", "unlabeled"):
                record[part] = [id for id in record[part] if id != name]
        else:
            record["unlabeled"].append(name)
        Path("run/args.json").write_text(json.dumps(record))
        message = error("--out", "run")
        assert all(word in message for word in [name, "unfinished", "--overwrite", *words])


@pytest.mark.parametrize("supervised", ["", "--supervised"])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_no_iterations_at_all(main, script, supervised):
    """The networks as they begin are evaluated; or one line says that there must be a step."""
    argv = re.sub(r"(iterations|warmup) \d", r"\1 0", ONE_STEP[script])
    argv = f"{argv} {supervised} --labels 4 --batch-size 2 --crop 32 32 --out run".split()
    try:
        run_on_few_streets(script, *argv)
    except common.UserError as error:
        assert "iterations 0" in str(error)
    else:
        assert json.loads(Path("run/result.json").read_text())["iterations"] == 0


# ---- fuzz ----------------------------------------------------------------------------------------

INTEGERS = ["0", "1", "2", "-1", "1", "2", "100000000000000000000", "1e3", "x", ""]
NUMBERS = ["0", "0.1", "0.5", "1", "0.9", "2", "-1", "inf", "nan", "1e30", "1e-9", "x", ""]
TEXTS = ["x", "", "none", "nowhere/x", "/dev/null", "\u9053", "1/2", "2", "\n"]
LEFT_OUT = {"--download", "--help", "--out", "--data-root", "--cache"}


def draw_flags(parser, random):
    """One to four flags with values that are usual, or absurd."""
    actions = [a for a in parser._actions if not LEFT_OUT & set(a.option_strings)]
    argv = []
    for action in random.sample(actions, random.randint(1, 4)):
        argv.append(random.choice(action.option_strings))
        if action.nargs == 0:
            continue
        kind = {int: INTEGERS, float: NUMBERS}.get(action.type, TEXTS)
        if action.choices and random.random() < 0.9:
            kind = list(map(str, action.choices))
        if action.dest in ("network", "backbone"):
            kind = ["setr", "pspnet", "deeplabv3plus", "tiny", "resnet50", "vit_b_16", "x,tiny"]
        count = action.nargs if isinstance(action.nargs, int) else 1
        if action.nargs == "+":
            count = random.randint(1, 3)
        argv += [random.choice(kind) for _ in range(count)]
    return argv


@pytest.mark.parametrize("number", range(int(os.environ.get("FUZZ", 40))))
def test_no_command_ends_in_a_traceback(main, shallow, monkeypatch, number):
    """Exit status 0 or 2, in thirty seconds of computing. FUZZ=300 draws more commands."""
    random = Random(number)
    script = random.choice(SCRIPTS)
    argv = f"{ONE_STEP[script]} --labels 4 --batch-size 2 --crop 32 32 --out run".split()
    argv += draw_flags(script.get_parser(), random)
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    prepare_run_main(monkeypatch)
    began = time.process_time()
    status = 0
    try:
        common.run_main(lambda: run_on_few_streets(script, *argv))
    except SystemExit as end:
        status = end.code
    assert status in (0, None, 2), argv
    assert time.process_time() - began < 30, argv


def no_network(*_, **__):
    raise OSError("no route to host")


# ---- beside other processes ----------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_threads_do_not_wait_for_each_other_in_a_long_loop(script):
    """libgomp reads GOMP_SPINCOUNT when torch is loaded: common must be imported before it."""
    source = Path(script.__file__).read_text()
    assert 0 < source.index("\nimport common") < source.index("\nimport torch")
    assert source.index("import torch") < source.index("\nfrom common import")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have another OpenMP")
@pytest.mark.parametrize("given, expected", [(None, 3000), ("7", 7)])
def test_libgomp_is_told_how_long_threads_wait(given, expected):
    env = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    env["OMP_DISPLAY_ENV"] = "verbose"
    if given:
        env["GOMP_SPINCOUNT"] = given
    command = [sys.executable, rml.__file__, "--help"]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert f"GOMP_SPINCOUNT = '{expected}'" in result.stderr
