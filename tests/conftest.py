"""Two processes for the whole suite, and the fixtures that the tests of whole runs share."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402


# `python -m pytest` without arguments runs in two processes with one thread each, for about half
# of the minutes. One takes the files from the first on, the other from the last. Whoever comes to a
# file first makes an empty file of its name in CLAIMS, and the other one leaves it out.
# Set for the second process, but not for what its tests start.
CLAIMS = os.environ.pop("PYTEST_CLAIMS", None)


def pytest_configure(config):
    global CLAIMS
    config.addinivalue_line("markers", "cuda: needs a GPU; tests/gpu_day.sh runs these")
    config.second = None
    config.claimed = {}  # of each file: whether this process runs it
    if CLAIMS or config.invocation_params.args:
        return
    config.claims_folder = tempfile.TemporaryDirectory()
    CLAIMS = config.claims_folder.name
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the runs that tests start
    config.second = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        env=os.environ | {"PYTEST_CLAIMS": CLAIMS},
        stdout=open(Path(CLAIMS, "output"), "w"),
        stderr=subprocess.STDOUT,
    )


def pytest_collection_modifyitems(config, items):
    if CLAIMS and not config.second:
        files = list(dict.fromkeys(item.path for item in items))
        items.sort(key=lambda item: -files.index(item.path))  # last file first, each in its order


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    if not CLAIMS:
        return None
    claimed = item.config.claimed
    if item.path not in claimed:
        try:
            Path(CLAIMS, item.path.name).touch(exist_ok=False)
            claimed[item.path] = True
        except FileExistsError:
            claimed[item.path] = False
    return None if claimed[item.path] else True  # True: nothing is left to do for this test


def pytest_sessionfinish(session):
    second = session.config.second
    if second:
        status = second.wait()
        print(f"\n\nthe second process:\n{Path(CLAIMS, 'output').read_text()}")
        session.exitstatus = session.exitstatus or status


@pytest.fixture(scope="module")
def one_thread():
    """One thread: the bits of runs started with one thread, and faster for small tensors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def main(request, tmp_path, monkeypatch):
    """main("--out", "run", ..) in tmp_path: the module's start(..)."""
    monkeypatch.chdir(tmp_path)
    return request.module.start


@pytest.fixture
def error(main):
    """The text of the UserError that a module's main(..) ends with: one line."""

    def run(*argv):
        with pytest.raises(common.UserError) as caught:
            main(*argv)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return run


@pytest.fixture
def seeded():
    torch.manual_seed(0)


class Killed(BaseException):
    pass


@pytest.fixture
def kill(main, monkeypatch):
    """kill(target, name, condition, ..): a run that ends as if it was killed in target.name(..).

It ends at the first call for which condition(arguments of the call) is true."""

    def go(target, name, condition, *argv):
        real = getattr(target, name)

        def fatal(*args, **kwargs):
            if condition(*args, **kwargs):
                raise Killed
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(target, name, fatal)
            with pytest.raises(Killed):
                main("--out", "run", *argv)
        assert not Path("run/result.json").exists()

    return go
