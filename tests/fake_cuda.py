"""Run a script as if this machine had GPUs: tensors on the CPU are real, those on CUDA are fake.

A fake tensor has a device, a type and a size, but no values. An operation fails if it mixes it with
a tensor on the CPU, as on a GPU. Whoever reads a fake tensor gets zeros. Backward passes do not
run, so weights do not change."""

import contextlib
import sys
from collections import Counter
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_leaves, tree_map_only

import common

aten = torch.ops.aten
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
READING = {  # operations whose result, or its size, depends on values: the host waits for them
    aten._local_scalar_dense, aten.bincount, aten.equal, aten.masked_select, aten.nonzero,
    aten._unique2, aten.unique_consecutive, aten.unique_dim,
}  # fmt: skip
COPYING = {  # operations that compute nothing
    aten._to_copy, aten.cat, aten.clone, aten.empty_like, aten.empty_strided, aten.max,
    torch.ops.prims.convert_element_type,
}  # fmt: skip


class Sync(Exception):
    """The host waited for the GPU where it may not."""


class Mixed(Exception):
    """An operation has tensors of the CPU and of the GPU."""


class FakeCuda(FakeTensorMode):
    """Fakes CUDA, as a context. While strict is true, waiting for the GPU raises Sync."""

    avoid_device_init = True  # whatever torch.cuda.is_available() says
    strict = False
    watch = None  # watch(operation, result) sees each operation on fake tensors

    def __deepcopy__(self, memo):
        return self  # a copied tensor has the same mode

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = torch.device(kwargs.get("device") or "cpu")
        operation = func.overloadpacket
        if operation is aten._pin_memory:
            return args[0]
        if FakeTensor not in types and device.type == "cpu":
            return func(*args, **kwargs)
        if operation is aten._to_copy:
            source = args[0]
            target = torch.device(kwargs.get("device") or source.device)
            if source.device.type != target.type:
                self.wait_for_copy(source, target, kwargs.get("non_blocking"))
                dtype = kwargs.get("dtype") or source.dtype
                return self.empty(source.shape, dtype, target)
        if operation is aten.copy_ and args[0].device.type != args[1].device.type:
            self.wait_for_copy(args[1], args[0].device, len(args) > 2 and args[2])
            return args[0]
        check_devices(operation, args)
        if operation in READING or (operation in INDEXING and indexes_by_values(*args[:3])):
            self.wait(operation)
            return self.read(operation, args, kwargs)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self.watch:
            self.watch(func, result)
        return result

    def wait(self, what):
        if self.strict:
            raise Sync(f"{what} makes the host wait for the GPU")

    def wait_for_copy(self, source, target, non_blocking):
        if not non_blocking:
            self.wait(f"a copy of {tuple(source.shape)} from {source.device.type} to {target.type}")

    def empty(self, shape, dtype, device):
        """A tensor of ones on the CPU, or a fake one."""
        if device.type == "cpu":
            return torch.ones(shape, dtype=dtype)
        with self:
            return torch.empty(shape, dtype=dtype, device=device)

    def read(self, operation, args, kwargs):
        """The result for zeros."""
        if operation is aten._local_scalar_dense:
            return torch.zeros((), dtype=args[0].dtype).item()
        if operation is aten.equal:
            return False
        shape = {aten.bincount: args[2:], aten.nonzero: (0, args[0].dim())}
        return self.empty(shape.get(operation, (0,)), torch.int64, args[0].device)


def check_devices(operation, args):
    """A Mixed if a tensor lies on the CPU. A single number may."""
    for arg in args:
        for tensor in arg if isinstance(arg, (list, tuple)) else [arg]:
            if torch.is_tensor(tensor) and tensor.device.type == "cpu" and tensor.dim():
                raise Mixed(f"{operation}: {tuple(tensor.shape)} lies on the CPU, others on CUDA")


def indexes_by_values(tensor, indices, value=None):
    """Whether a mask is an index."""
    indices = [index for index in indices if index is not None]
    number = value is not None and value.device.type == "cpu"  # then it is masked_fill()
    masks = [index for index in indices if index.dtype in (torch.bool, torch.uint8)]
    return bool(masks) and not (number and len(indices) == 1)


class Event:
    """torch.cuda.Event. Its synchronize() waits for what was recorded, not for what came later."""

    def record(self):
        pass

    def synchronize(self):
        pass


class Pictures:
    """Cityscapes with three training pictures and one of val, all black."""

    def __init__(self, size):
        cities = [f"city/city_000000_{i:06d}" for i in range(4)]
        self.name = "cityscapes"
        self.names = list(common.CITYSCAPES)
        self.colors = np.array(list(common.CITYSCAPES.values()), np.uint8)
        self.train = cities[:3]
        self.val = cities[3:]
        self.files = {id: (None, True) for id in cities}
        self.size = size
        self.official = []
        self.extra = []

    def image(self, id):
        return np.zeros((*self.size, 3), np.uint8)

    def label(self, id, full_size=False):
        return np.zeros(self.size, np.uint8)


def black_sample(stream, position):
    """What Stream.__getitem__() returns, of black pictures that fill their crop."""
    height, width = stream.crop
    key = "label" if stream.labeled else "truth"
    sample = {"image": torch.zeros(3, height, width, dtype=torch.uint8)}
    sample[key] = torch.zeros(height, width, dtype=torch.uint8)
    sample["valid"] = torch.ones(height, width, dtype=torch.bool)
    sample["position"] = position
    sample["inside"] = torch.tensor([0, height, 0, width])
    cells = [-(-side // stream.stride) for side in stream.crop]
    for i in range(len(stream.soft_labels)):
        sample[f"soft_{i}"] = torch.zeros(len(stream.data.names), *cells)
    return sample


@contextlib.contextmanager
def gpus(processes=1, rank=0):
    """Fake GPUs, and this process as one of several. Yields what is seen:

    mode: the FakeCuda.  steps: {stage: the number of steps}.  quiet: the steps without a log.
    losses: the types of all loss terms.  rough: operations in bf16 or fp16 outside of the passes
    of networks, but for views.  collectives: what this process asks of the others, a list
    of (name, type, shape), and of names alone.  students: what common.parallel() returns."""
    mode = FakeCuda(allow_non_fake_inputs=True)
    seen = SimpleNamespace(
        mode=mode, steps=Counter(), quiet=0, losses=set(), rough=set(), collectives=[],
        students=[])
    with pytest.MonkeyPatch.context() as patch, mode:
        fake_gpus(patch, processes)
        watch_steps(patch, seen)
        watch_precision(patch, seen)
        if processes > 1:
            fake_processes(patch, seen, processes, rank)
        yield seen


def fake_gpus(patch, count):
    for name in ("is_available", "is_bf16_supported"):
        patch.setattr(torch.cuda, name, lambda: True)
    patch.setattr(torch.cuda, "device_count", lambda: count)
    patch.setattr(torch.cuda, "set_device", lambda device: None)
    patch.setattr(torch.cuda, "get_device_name", lambda device: "fake")
    patch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    card = SimpleNamespace(total_memory=80 * 2**30)
    patch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    patch.setattr(torch.cuda, "Event", Event)
    patch.setattr(torch.backends.cudnn, "benchmark", False)  # setup() sets it
    patch.setattr(torch.Tensor, "backward", lambda loss: None)
    # One block a layer: the same shapes as 33 blocks have, in a tenth of the time.
    patch.setattr(common, "RESNETS", dict.fromkeys(common.RESNETS, (1, 1, 1, 1)))
    patch.setattr(common, "VITS", {name: (v[0], 1, *v[2:]) for name, v in common.VITS.items()})
    save = torch.save
    load = common.load_torch
    write = common.Run._write_checkpoint

    def ones(tensor):  # a single number in the file
        return torch.ones((), dtype=tensor.dtype).expand(tensor.shape)

    def load_real(path, *advice):
        with unset_fake_temporarily():
            return load(path, *advice)

    def write_and_touch(run, iteration, keep):
        write(run, iteration, keep)
        (run.folder / "last.pt").touch()  # as if the main process has written it

    without_fakes = partial(tree_map_only, FakeTensor, ones)
    patch.setattr(torch, "save", lambda state, file: save(without_fakes(state), file))
    patch.setattr(common, "load_torch", load_real)
    patch.setattr(common.Run, "_write_checkpoint", write_and_touch)
    patch.setattr(common.Run, "_check_weights", lambda run, networks: None)
    patch.setattr(common.Run, "_draw_predictions", lambda run, networks: None)  # as evaluations


def watch_steps(patch, seen):
    """From its batch to its log a step may not wait. The log itself, evaluations, pictures may."""
    mode = seen.mode
    batches = common.batches
    step = common.Run.step
    log = common.Run._log

    def strict_batches(*args, **kwargs):
        for batch in batches(*args, **kwargs):
            mode.strict = True
            yield batch
            mode.strict = False

    def watched_step(run, iteration, losses, *args, **kwargs):
        assert mode.strict
        seen.losses |= {loss.dtype for loss in losses.values()}
        step(run, iteration, losses, *args, **kwargs)
        seen.quiet += mode.strict
        seen.steps[run.stage] += 1

    def relaxed_log(run, numbers):
        mode.strict = False
        log(run, numbers)

    patch.setattr(common, "batches", strict_batches)
    patch.setattr(common.Run, "step", watched_step)
    patch.setattr(common.Run, "_log", relaxed_log)
    patch.setattr(common.Stream, "__getitem__", black_sample)


def watch_precision(patch, seen):
    enter = torch.autocast.__enter__
    leave = torch.autocast.__exit__
    passes = []

    def enter_pass(context):
        passes.append(context)
        return enter(context)

    def leave_pass(context, *error):
        passes.pop()
        return leave(context, *error)

    def watch(func, result):
        dtypes = {tensor.dtype for tensor in tree_leaves(result) if torch.is_tensor(tensor)}
        rough = dtypes & {torch.bfloat16, torch.float16}
        if rough and not passes and not func.is_view and func.overloadpacket not in COPYING:
            seen.rough.add(str(func))

    patch.setattr(torch.autocast, "__enter__", enter_pass)
    patch.setattr(torch.autocast, "__exit__", leave_pass)
    seen.mode.watch = watch


def fake_processes(patch, seen, processes, rank):
    """torch.distributed, with nobody at the other end."""

    def collective(name, *tensors):
        for tensor in tensors:
            assert tensor.device.type == "cuda", f"{name}: {tensor.shape} lies on the CPU"
            dense = [torch.contiguous_format, torch.channels_last]
            dense = any(tensor.is_contiguous(memory_format=f) for f in dense[: tensor.dim() - 2])
            assert dense or tensor.is_contiguous(), f"{name}: NCCL takes contiguous tensors"
            seen.collectives.append((name, tensor.dtype, tuple(tensor.shape)))
        if not tensors:
            seen.collectives.append(name)

    def all_gather(parts, tensor):
        assert len(parts) == processes
        collective("all_gather", tensor, *parts)

    def batch_norm(norm, x):
        if norm.training:
            collective("sync_batch_norm", x.sum((0, 2, 3)))
        use = norm.training or norm.running_mean is None
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, use)

    class Parallel(torch.nn.Module):
        """DistributedDataParallel."""

        def __init__(self, network, device_ids, **options):
            super().__init__()
            assert device_ids == [0]
            assert {p.device for p in network.parameters()} == {torch.device("cuda", 0)}
            assert not options["broadcast_buffers"]
            self.module = network
            seen.students.append(network)

        def forward(self, *args, **kwargs):
            seen.collectives.append("gradients")
            return self.module(*args, **kwargs)

    patch.setenv("LOCAL_RANK", "0")  # as on two machines
    patch.setattr(dist, "is_initialized", lambda: True)
    patch.setattr(dist, "get_world_size", lambda: processes)
    patch.setattr(dist, "get_rank", lambda: rank)
    patch.setattr(dist, "barrier", lambda: collective("barrier"))
    patch.setattr(dist, "all_reduce", lambda tensor: collective("all_reduce", tensor))
    patch.setattr(dist, "all_gather", all_gather)
    patch.setattr(torch.nn.parallel, "DistributedDataParallel", Parallel)
    patch.setattr(torch.nn.SyncBatchNorm, "forward", batch_norm)


def run(script, folder, *argv, size=(128, 256)):
    """The script's main() on few black pictures of this size, within gpus()."""
    data = Pictures(size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "open_dataset", lambda args: data)
        # Pseudo-labels, also those that another process would have written.
        patch.setattr(common, "read_pseudo_label", lambda folder, id, size=None: data.label(id))
        patch.setattr(common, "check_before_training", lambda *args: None)
        usual = f"--dataset cityscapes --weights none --workers 0 --labels 2 --out {folder}"
        patch.setattr(sys, "argv", [script.__name__, *usual.split(), *argv])
        script.main()
