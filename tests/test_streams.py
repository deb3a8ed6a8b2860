"""Decodes on two streams: no operation may read or write what another one, not ordered before it, writes or reads.

The layers run as they do in a captured decode, on a CPU: every operation of torch is counted to the stream that would
launch it, and held against the order that the streams' waits establish.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from engine import engine
from tiny_checkpoint import write_random
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vllm_dsa import attention
from vllm_dsa.testing import compare

SIZES = dict(num_hidden_layers=2, num_attention_heads=2, index_n_heads=8, index_topk=16)
PROMPTS = [torch.randint(8, 300, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (12, 90)]
ORDER = ("fork", "fork", "join", "fork", "join")  # of a layer that selects
DROPPED = (None, *range(len(ORDER)))


class Streams(TorchDispatchMode):
    """Two streams, 0 and 1, each with a clock of what it has seen of both. The wait ``dropped`` does not wait.

    races: operations on a storage that another one, in no order with them, writes, or that they write.
    """

    def __init__(self, inputs: list[torch.Tensor], dropped: int | None) -> None:
        super().__init__()
        self.now, self.waits, self.dropped = 0, [], dropped
        self.clocks = [[1, 0], [0, 0]]
        self.written: dict[int, tuple[int, int]] = {}
        self.read: dict[int, list[tuple[int, int]]] = {}
        self.kept: list[torch.UntypedStorage] = []  # else a later tensor may have an earlier one's address
        self.ran, self.races = [0, 0], []
        for x in inputs:
            self.access(x, 0, True, "input")

    def wait(self, name: str, waiting: int, other: int) -> None:
        if len(self.waits) != self.dropped:
            self.clocks[waiting] = [max(pair) for pair in zip(*self.clocks, strict=True)]
        self.waits.append(name)

    @contextmanager
    def on(self, stream: int):
        before, self.now = self.now, stream
        yield
        self.now = before

    def access(self, x: torch.Tensor, stream: int, writes: bool, what: str) -> None:
        storage = x.untyped_storage()
        self.kept.append(storage)
        key, seen = storage._cdata, self.clocks[stream]
        earlier = [self.written[key]] if key in self.written else []
        earlier += self.read.get(key, []) if writes else []
        if any(seen[owner] < time for owner, time in earlier):
            self.races.append(f"{what} on stream {stream}: {tuple(x.shape)}")
        if writes:
            self.written[key] = (stream, seen[stream])
        else:
            self.read.setdefault(key, []).append((stream, seen[stream]))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        returned = func(*args, **kwargs)
        schema, stream = func._schema, self.now
        made = storages(returned)
        if made and made <= storages((args, kwargs)) and not any(map(is_written, schema.arguments)):
            return returned  # a view launches nothing; told by its storage, since ``to`` may return one or not
        if str(func).startswith(("aten.empty", "aten.new_empty")):
            return returned
        self.ran[stream] += 1
        self.clocks[stream][stream] += 1
        given = [(a, args[i] if i < len(args) else kwargs.get(a.name)) for i, a in enumerate(schema.arguments)]
        for writes in (False, True):
            for argument, value in given:
                if writes == is_written(argument):
                    for x in tree_leaves(value):
                        if isinstance(x, torch.Tensor) and x.numel():
                            self.access(x, stream, writes, str(func))
        for x in tree_leaves(returned):
            if isinstance(x, torch.Tensor) and x.numel():
                self.access(x, stream, True, str(func))
        return returned


def is_written(argument: torch.Argument) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def storages(tree: object) -> set[int]:
    return {x.untyped_storage()._cdata for x in tree_leaves(tree) if isinstance(x, torch.Tensor)}


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    path = tmp_path_factory.mktemp("random")
    write_random(path, seed=1, **SIZES)
    with engine(path) as started:
        yield started


@pytest.fixture
def simulate(monkeypatch):
    """simulate(run, inputs, dropped): the streams that run() used of inputs, one of their waits dropped."""
    now, on = [], attention._on
    monkeypatch.setattr(attention.DSAAttention, "second_stream", lambda _: now[0] if now else None)
    monkeypatch.setattr(attention, "aux_stream", lambda: now[0])
    monkeypatch.setattr(attention, "_fork", lambda streams: streams and streams.wait("fork", 1, 0))
    monkeypatch.setattr(attention, "_join", lambda streams: streams and streams.wait("join", 0, 1))
    monkeypatch.setattr(attention, "_on", lambda streams: streams.on(1) if streams else on(None))

    def simulate(run, inputs, dropped, order=ORDER):
        now.append(Streams(inputs, dropped))
        with now[0]:
            run()
        streams = now.pop()
        assert tuple(streams.waits) == order
        assert min(streams.ran) >= 5, streams.ran
        return streams

    return simulate


@pytest.mark.parametrize("dropped", DROPPED, ids=["all waits", *(f"no {name} {i}" for i, name in enumerate(ORDER))])
def test_a_layer(dropped, running, simulate, monkeypatch):
    """Every layer of every step, as it is and then on two streams."""
    forward, done = attention.DSAAttention.forward, []

    def twice(layer, *inputs):
        want, got = forward(layer, *inputs), []
        done.append(simulate(lambda: got.append(forward(layer, *inputs)), inputs, dropped))
        compare.assert_same_bits("output of a layer on two streams", got[0], want)
        return want

    monkeypatch.setattr(attention.DSAAttention, "forward", twice)
    running.generate(PROMPTS, 3, ignore_eos=True)
    assert len(done) >= 3 * SIZES["num_hidden_layers"]
    assert all(bool(streams.races) == (dropped is not None) for streams in done)


@torch.inference_mode()
@pytest.mark.parametrize("dropped", (None, 0, 1, 3))  # its queries are there before it begins: no 2
def test_warm_up(dropped, running, simulate, monkeypatch):
    steps, step = [], attention._step
    monkeypatch.setattr(attention, "_step", lambda *args: steps.append(args) or step(*args))
    running.generate(PROMPTS, 1)
    layer, _, *tensors, _ = steps[0]
    streams = simulate(lambda: layer.warm_up(*tensors), tensors, dropped, ORDER[1:])
    assert bool(streams.races) == (dropped is not None)


@pytest.mark.parametrize("but", [None, "a CPU", "launched", "in pieces", "profiled"])
def test_only_in_a_step_that_is_captured_as_one_graph(but, monkeypatch):
    layer = SimpleNamespace(cos_sin=SimpleNamespace(is_cuda=but != "a CPU"))
    context = SimpleNamespace(attn_metadata=None if but == "profiled" else {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: but != "launched")
    capture = SimpleNamespace(is_active=lambda: but == "in pieces")
    monkeypatch.setattr(attention, "BreakableCUDAGraphCapture", capture)
    monkeypatch.setattr(attention, "get_forward_context", lambda: context)
    monkeypatch.setattr(attention, "aux_stream", lambda: "the second")
    assert attention.DSAAttention.second_stream(layer) == (None if but else "the second")
