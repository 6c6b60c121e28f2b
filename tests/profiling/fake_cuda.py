"""A GPU that is the CPU: torch's CUDA interface with tensors of ``cuda`` devices made on the CPU.

It exercises the program's CUDA paths (events, streams, pinned copies, device selection), not CUDA.
"""

import time
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


def _here(value):
    if isinstance(value, torch.device):
        return CPU if value.type == "cuda" else value
    return CPU if isinstance(value, str) and value.startswith("cuda") else value


class _OnCpu(TorchFunctionMode):
    """Every function of torch sees the CPU where it is given a CUDA device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        kwargs = {name: _here(value) for name, value in (kwargs or {}).items()}
        return func(*(_here(value) for value in args), **kwargs)


class _Event:
    def __init__(self, enable_timing=False):
        assert enable_timing

    def record(self, stream=None):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)

    def query(self):
        return True

    def synchronize(self):
        pass


class _Stream:
    def __init__(self, device=None):
        assert device is None or device.type == "cuda"

    def record_event(self):
        event = _Event(True)
        event.record()
        return event

    def wait_event(self, event):
        assert isinstance(event, _Event)

    def wait_stream(self, other):
        assert isinstance(other, _Stream)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


def install(monkeypatch, calls):
    """Put the GPU in place; ``calls`` collects what was asked of it. Returns the mode to enter."""

    def note(name, value=None):
        def call(*arguments, **_):
            calls.append(name)
            return value(*arguments) if callable(value) else value

        return call

    properties = SimpleNamespace(
        name="Made GPU", total_memory=2**33, major=9, minor=0, multi_processor_count=8, L2_cache_size=2**20, uuid="0"
    )
    fakes = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": "Made GPU",
        "get_device_properties": properties,
        "get_device_capability": (9, 0),
        "mem_get_info": (2**33 - 2**20, 2**33),
        "memory_reserved": 0,
        "synchronize": None,
        "empty_cache": None,
        "_sleep": None,
        "current_stream": lambda *_: _Stream(),
        "stream": lambda stream: stream,
    }
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(f"set_device {device}"))
    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, note(name, value))
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "Stream", _Stream)
    monkeypatch.setattr(torch.version, "cuda", "0.0")
    monkeypatch.setattr(torch.Tensor, "pin_memory", note("pin_memory", lambda tensor: tensor))
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device=None: generator(_here(device)))
    return _OnCpu()
