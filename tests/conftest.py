"""Fixtures that the tests of whole runs share."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a GPU; tests/gpu_day.sh runs these")


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
