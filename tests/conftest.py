import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402


@pytest.fixture(scope="module")
def one_thread():
    """The bits of processes that are started with one thread; and what is small only waits for a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
