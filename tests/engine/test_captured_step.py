"""What captured steps ask of a runner: padding changes nothing, and news that come late change no
completion; and how they capture, with graphs that are simulated. Real ones are tested on a GPU, in
test_gpu_rollout.py."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from late_device import use_late_device
from rollout_cases import assert_same, completions_of, options_of, requests_of

from fuserl.model.cache import CacheShape
from fuserl.model.heads import LanguageModel
from fuserl.policy import Policy
from fuserl.rollout import captured_step, engine, module_runner
from fuserl.rollout.captured_step import WARM_UPS, CapturedSteps, bucket_of
from fuserl.rollout.decode import decode
from fuserl.rollout.live_rows import LiveRows, NewPrompt, NewRow
from fuserl.rollout.module_runner import GRAPH_STEPS, ModuleRunner
from fuserl.rollout.requests import End
from fuserl.rollout.runner import RunnerOptions
from fuserl.rollout.sampling import SamplingParams
from fuserl.rollout.stopping import StopRule
from fuserl_kernels.reference import advance_rows

MakeModel = Callable[..., LanguageModel]


def test_sizes_are_few_and_never_too_small() -> None:
    for num_slots in (1, 5, 64, 100, 512):
        sizes = [bucket_of(n, num_slots) for n in range(1, num_slots + 1)]
        assert all(n <= size <= num_slots for n, size in enumerate(sizes, 1))
        assert sizes == sorted(sizes)
        assert len(set(sizes)) <= 24
        assert bucket_of(num_slots, num_slots) == num_slots
    assert [bucket_of(n, 512) for n in (1, 3, 9, 17, 256, 257)] == [1, 4, 16, 32, 256, 320]


@pytest.mark.parametrize("num_slots", [1, 3, 7, 40], ids=lambda n: f"{n} slots")
@pytest.mark.parametrize("stop_ids", [(), (7, 11), tuple(range(20))], ids=["none", "some", "half"])
@pytest.mark.parametrize("keep_before", [0, 1])
def test_late_news_change_no_completion(
    make_model: MakeModel,
    monkeypatch: pytest.MonkeyPatch,
    num_slots: int,
    stop_ids: tuple[int, ...],
    keep_before: int,
) -> None:
    model = make_model(seed=2)
    requests = requests_of(9, (30, 1, 17, 8, 9))
    options = options_of(*stop_ids, keep_before=keep_before, top_k=12)
    monkeypatch.setattr(engine, "make_runner", lambda model: ModuleRunner)
    want = completions_of(model, requests, options, num_slots=num_slots)
    made = use_late_device(monkeypatch)
    got = completions_of(model, requests, options, num_slots=num_slots)
    assert_same(got, want)
    ends = [completion.end for completion in got.values()]
    assert (End.STOP in ends) == bool(stop_ids)
    [runner] = made
    replays = runner.graphs.sizes
    assert max(steps for _, _, steps in replays) == GRAPH_STEPS
    if num_slots == 40 and stop_ids == (7, 11):
        assert any(size > rows for rows, size, _ in replays)


def test_late_news_change_no_stop_string(
    make_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(seed=1)
    tokenizer = policy.tokenizer
    assert tokenizer is not None
    rule = StopRule(strings=("dog", "re"), tokenizer=tokenizer)
    options = RunnerOptions(sampling=SamplingParams(seed=5), stop=rule)
    requests = requests_of(6, (80,), samples=4)
    monkeypatch.setattr(engine, "make_runner", lambda model: ModuleRunner)
    want = completions_of(policy.model, requests, options)
    use_late_device(monkeypatch)
    got = completions_of(policy.model, requests, options)
    assert_same(got, want)
    stopped = [c for c in got.values() if c.end is End.STOP]
    assert len(stopped) > 2
    texts = [tokenizer.decode(completion.token_ids.tolist()) for completion in stopped]
    assert all("dog" in text or "re" in text for text in texts)


def test_a_flag_in_the_last_step_of_a_call_is_not_lost(
    make_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host's last look is older than the last steps: what it missed, it is told at the end."""
    policy = make_policy(seed=1)
    assert policy.tokenizer is not None
    rule = StopRule(strings=("dog",), tokenizer=policy.tokenizer)
    made = use_late_device(monkeypatch)
    runner = engine.make_runner(policy.model)(
        policy.model,
        CacheShape(num_slots=2, capacity=40, num_prompts=1, prompt_capacity=4),
        RunnerOptions(sampling=SamplingParams(), stop=rule),
    )
    assert runner is made[0]
    flags = rule.flag_table(policy.model.config.vocab_size, policy.model.device)
    assert flags is not None
    runner._is_flag = torch.ones_like(flags)
    runner.admit([NewPrompt(0, [5, 6])], [NewRow(0, 0, 40, 0), NewRow(1, 0, 40, 1)])
    assert runner.run(GRAPH_STEPS, 2) == []
    assert runner.num_flagged == 2 * GRAPH_STEPS


@pytest.mark.parametrize("most_tokens", [1, 4, 7])
def test_prompts_computed_in_parts_are_the_same(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, most_tokens: int
) -> None:
    model, requests = make_model(seed=2), requests_of(9, (6,))
    monkeypatch.setattr(engine, "make_runner", lambda model: ModuleRunner)
    options = options_of(keep_before=1)
    want = completions_of(model, requests, options)
    sizes: list[int] = []
    prefill = ModuleRunner._prefill

    def watched(self: ModuleRunner, prompts: Sequence[NewPrompt]) -> list[torch.Tensor | None]:
        sizes.append(sum(len(prompt.ids) for prompt in prompts))
        assert sizes[-1] <= most_tokens or len(prompts) == 1
        return prefill(self, prompts)

    monkeypatch.setattr(ModuleRunner, "_prefill", watched)
    monkeypatch.setattr(module_runner, "PREFILL_TOKENS", most_tokens)
    assert_same(completions_of(model, requests, options), want)
    assert len(sizes) > 2
    assert sum(sizes) == sum(len(request.ids) for request in requests)


def test_limits_are_no_news(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is decoded behind the last limit, however late the host looks."""
    made = use_late_device(monkeypatch)
    got = completions_of(make_model(seed=2), requests_of(4, (21,)), options_of())
    assert all(len(completion.token_ids) == 21 for completion in got.values())
    assert made[0].graphs.num_steps == 21


def test_when_all_have_stopped_the_loop_ends(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One look late, and not at the limit: every id is a stop."""
    made = use_late_device(monkeypatch)
    got = completions_of(make_model(seed=2), requests_of(4, (90,)), options_of(*range(40)))
    assert all(len(completion.token_ids) == 1 for completion in got.values())
    assert made[0].graphs.num_steps == 2 * GRAPH_STEPS


def test_rows_that_are_off_change_nothing(make_model: MakeModel) -> None:
    """A step of more rows than live: the live ones get the same bits, and nothing else is written
    but the slot that is there for them."""
    model = make_model(seed=2)
    shape = CacheShape(num_slots=8, capacity=6, num_prompts=2, prompt_capacity=4)
    states = []
    for num_rows in (3, 8):
        runner = ModuleRunner(model, shape, options_of(keep_before=1))
        cache, rows = runner._cache, runner.rows
        for arena in (cache.keys, cache.values):
            arena.zero_()
        rows.token_ids.fill_(-5)
        runner.admit(
            [NewPrompt(0, [4, 5, 6]), NewPrompt(1, [9])],
            [NewRow(6, 0, 6, 0), NewRow(1, 1, 6, 1), NewRow(3, 0, 6, 2)],
        )
        rows.slots[3:] = -1
        rows.hidden[3:] = torch.nan
        rows.prompt_ids[3:] = 1
        for _ in range(4):
            with torch.no_grad():
                runner._step(num_rows)
        assert rows.slots[3:].eq(-1).all()
        assert rows.lengths.tolist() == [4, 4, 4, 0, 0, 0, 0, 0]
        assert rows.token_ids[[0, 2, 4, 5, 7]].eq(-5).all()
        states.append(
            (rows.token_ids[:-1], rows.logprobs[:-1], rows.hidden[:3], cache.keys, cache.values)
        )
    for one, other in zip(*states, strict=True):
        assert torch.equal(one, other)


def test_a_slot_is_never_passed(make_model: MakeModel) -> None:
    """A row that ended at the last place of its slot writes nothing more, anywhere."""
    model = make_model(seed=2)
    shape = CacheShape(num_slots=2, capacity=3, num_prompts=1, prompt_capacity=2)
    runner = ModuleRunner(model, shape, options_of())
    runner._cache.keys.zero_()
    runner.admit([NewPrompt(0, [4, 5])], [NewRow(0, 0, 3, 0), NewRow(1, 0, 2, 1)])
    with torch.no_grad():
        for _ in range(3):
            runner._step(2)
        held = [x.clone() for x in (runner.rows.token_ids[:-1], runner._cache.keys)]
        for _ in range(5):
            runner._step(2)
    assert runner.rows.slots.tolist() == [-1, -1]
    for before, now in zip(held, (runner.rows.token_ids[:-1], runner._cache.keys), strict=True):
        assert torch.equal(before, now)
    assert [(e.slot, e.length, e.end) for e in runner._take_ended()] == [
        (0, 3, End.LIMIT),
        (1, 2, End.LIMIT),
    ]


def test_ends_have_the_kernels_numbers() -> None:
    assert {end.name: int(end) for end in End} == {
        name: getattr(advance_rows, name) for name in ("STOP", "LIMIT", "BROKEN")
    }


class Device:
    """Stands for torch.cuda: a graph remembers the step that was called inside of its capture, and
    what it was captured with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current: object = "main"
        self.capturing: dict[str, Any] | None = None
        self.captures: list[dict[str, Any]] = []
        names = ("CUDAGraph", "graph", "Stream", "stream", "current_stream", "device")
        for name in names:
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(captured_step, "_idle_streams", {})

    class CUDAGraph:
        steps: list[Callable[[], None]]

        def replay(self) -> None:
            for step in self.steps:
                step()

        def pool(self) -> str:
            return "pool"

    class Stream:
        def __init__(self, device: torch.device) -> None:
            self.waited_for: list[object] = []

        def wait_stream(self, other: object) -> None:
            self.waited_for.append(other)

    class Main(Stream):
        """The stream that steps are replayed on."""

    @contextmanager
    def graph(self, graph: CUDAGraph, **options: Any) -> Iterator[None]:
        graph.steps = []
        self.capturing = {"graph": graph, **options}
        self.captures.append(self.capturing)
        yield
        self.capturing = None

    @contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        yield

    def current_stream(self) -> object:
        if self.current == "main":
            self.current = self.Main(torch.device("cpu"))
        return self.current


def test_a_size_is_captured_once_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    cpu = torch.device("cpu")
    rows = LiveRows(8, 4, 1, 2, torch.float32, cpu)
    rows.num_rows = 3
    ran: list[tuple[int, list[int], object]] = []

    def body(num_rows: int) -> None:
        ran.append((num_rows, rows.slots[:num_rows].tolist(), device.current))
        rows.lengths[:num_rows] += rows.slots[:num_rows] >= 0
        rows.hidden[:num_rows] += 1

    def step(num_rows: int) -> None:
        if device.capturing is None:
            body(num_rows)
        else:
            device.capturing["graph"].steps.append(lambda: body(num_rows))

    rows.slots.copy_(torch.tensor([5, 0, 2, 7, 7, 7, 7, 7]))
    graphs = CapturedSteps(rows)
    graphs.replay(step, 3, 2)
    main, side = device.current, device.captures[0]["stream"]
    assert ran[:WARM_UPS] == [(4, [-1] * 4, side)] * WARM_UPS, "warming up is no step of a live row"
    assert ran[WARM_UPS:] == [(4, [5, 0, 2, -1], main)] * 2
    assert rows.lengths.tolist() == [2, 2, 2, 0, 0, 0, 0, 0]
    assert rows.hidden[:4].eq(2).all(), "what warming up wrote is undone"
    assert side.waited_for == [main]
    assert main.waited_for == [side]  # type: ignore[attr-defined]

    graphs.replay(step, 4, 1)
    graphs.replay(step, 1, 3)
    assert graphs.sizes == (4, 1)
    assert graphs.seconds > 0
    assert [c["pool"] for c in device.captures] == [None, "pool"]
    assert [c["stream"] for c in device.captures] == [side, side]

    others = CapturedSteps(rows)
    others.replay(step, 1, 1)
    assert device.captures[-1]["stream"] is not side, "two that live share no stream"
    del graphs
    CapturedSteps(rows).replay(step, 1, 1)
    assert device.captures[-1]["stream"] is side, "a stream is used again"


def test_all_sizes_may_be_captured_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    rows = LiveRows(40, 4, 1, 2, torch.float32, torch.device("cpu"))
    rows.slots.copy_(torch.arange(40))
    ran: list[int] = []

    def step(num_rows: int) -> None:
        if device.capturing is None:
            assert rows.slots[:num_rows].eq(-1).all(), "a live row takes no step"
            ran.append(num_rows)
        else:
            device.capturing["graph"].steps.append(lambda: ran.append(-num_rows))

    graphs = CapturedSteps(rows)
    graphs.prepare(step, 20)
    assert graphs.sizes == (32, 16, 8, 4, 2, 1)
    assert rows.slots.tolist() == list(range(40))
    assert ran == [size for size in graphs.sizes for _ in range(WARM_UPS)]
    ran.clear()
    for num_rows in (20, 3, 1):
        graphs.replay(step, num_rows, 1)
    assert ran == [-32, -4, -1], "replayed, and nothing captured"


def test_what_shares_the_device_meets_no_capture(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rollout whose completions are handed on as they finish, to a thread maybe."""
    made = use_late_device(monkeypatch)
    model, options = make_model(seed=2), {"max_new_tokens": 5, "sampling": SamplingParams()}
    alone = decode(model, [[5, 6], [7]], **options)  # type: ignore[arg-type]
    handed: list[int] = []
    shared = decode(
        model,
        [[5, 6], [7]],
        on_completion=lambda completion: handed.append(completion.index),
        **options,  # type: ignore[arg-type]
    )
    assert [runner.graphs.prepared for runner in made] == [[], [2]]
    assert sorted(handed) == [0, 1]
    assert torch.equal(shared.token_ids, alone.token_ids)
