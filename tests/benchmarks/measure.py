"""The measurements, one function each. Ours and plain take turns, so that noise hits both."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from tests.benchmarks.ours import ADAM, BOUND_S, Ours, datum, draw
from tests.benchmarks.sides import Plain, Setup, Side
from tests.benchmarks.workloads import Batch, Workloads

# Both sides start from the same weights (B is zero), so they must agree on the first batch;
# bfloat16 rounds away 0.01 nats, a mistake in the data shows as whole nats.
SAME_LOGPROB_NATS = 0.05


@dataclass(frozen=True)
class Pair:
    """One quantity on both sides; `plain` None where there is nothing to compare."""

    ours: float
    plain: float | None


@dataclass(frozen=True)
class TrainingResult:
    """Best tokens/s of the rounds, and peak memory in bytes (None where it cannot be known)."""

    tokens_per_s: Pair
    peak_bytes: tuple[int | None, int | None]
    fastest_batches: tuple[Batch, Batch]


@contextlib.contextmanager
def both(setup: Setup) -> Iterator[tuple[Side, Side]]:
    """A fresh server and a fresh plain loop."""
    with contextlib.closing(Plain(setup)) as plain, contextlib.closing(Ours(setup)) as ours:
        yield ours, plain


def training(setup: Setup, warm_up: Batch, batches: Sequence[Batch], rounds: int) -> TrainingResult:
    """forward_backward, in fresh processes; the optim_step after each is not timed.

    Raises:
        AssertionError: The sides do not compute the same.
    """
    with both(setup) as sides:
        first = [_step(side, warm_up)[1] for side in sides]
        assert abs(first[0] - first[1]) < SAME_LOGPROB_NATS, (
            f"mean logprob of the same targets: ours {first[0]:.4f}, plain {first[1]:.4f}"
        )
        best = [(0.0, warm_up), (0.0, warm_up)]
        for number in range(rounds):
            batch = batches[number % len(batches)]
            for index, side in enumerate(sides):
                tokens_per_s = batch.tokens / _step(side, batch)[0]
                best[index] = max(best[index], (tokens_per_s, batch), key=lambda pair: pair[0])
        ours, plain = (side.peak_memory_bytes() for side in sides)
    return TrainingResult(Pair(best[0][0], best[1][0]), (ours, plain), (best[0][1], best[1][1]))


def sampling(setup: Setup, workloads: Workloads, rounds: int) -> dict[int, Pair]:
    """Best tokens/s by number of sequences drawn from one prompt, with a trained adapter."""
    sizes = workloads.sizes
    found = {}
    with both(setup) as sides:
        for side in sides:
            _step(side, workloads.warm_up)  # now B is not zero
        for count in sizes.sample_counts:
            best = [float("inf"), float("inf")]
            for number in range(rounds + 1):
                is_warm_up = number == 0
                new_tokens = 4 if is_warm_up else sizes.new_tokens
                for index, side in enumerate(sides):
                    seconds = side.sample(workloads.prompts[0], count, new_tokens)
                    best[index] = best[index] if is_warm_up else min(best[index], seconds)
            ours, plain = (count * sizes.new_tokens / seconds for seconds in best)
            found[count] = Pair(ours, plain)
    return found


def clients(setup: Setup, workloads: Workloads, rounds: int) -> Pair:
    """Tokens/s of several clients at once (`ours`) and one after the other (`plain`), best of each.

    Each has its own prompt and draws one sequence.
    """
    sizes = workloads.sizes
    best = {"at once": 0.0, "in turn": 0.0}
    with contextlib.closing(Ours(setup)) as ours:
        _step(ours, workloads.warm_up)
        samplers = ours.samplers(sizes.clients)
        jobs = [
            lambda new_tokens, sampler=sampler, prompt=prompt: draw(sampler, prompt, 1, new_tokens)
            for sampler, prompt in zip(samplers, workloads.prompts, strict=True)
        ]
        _at_once(jobs, 4)
        for _ in range(rounds):
            for name, way in (("at once", _at_once), ("in turn", _in_turn)):
                best[name] = max(best[name], way(jobs, sizes.new_tokens))
    return Pair(best["at once"], best["in turn"])


@dataclass(frozen=True)
class MixedResult:
    """Tokens/s; `ours` together, `plain` alone."""

    training: Pair
    sampling: Pair


def mixed(setup: Setup, workloads: Workloads) -> MixedResult:
    """Training steps and 8-sequence samples of one server: each alone, then together."""
    sizes = workloads.sizes
    with contextlib.closing(Ours(setup)) as ours:
        _step(ours, workloads.warm_up)
        sampler = ours.sampler()
        numbers = iter(range(10**9))

        def train() -> int:
            batch = workloads.supervised[next(numbers) % len(workloads.supervised)]
            data = [datum(example) for example in batch.examples]
            done = ours.training_client.forward_backward(data, batch.loss_fn)
            ours.training_client.optim_step(ADAM).result(BOUND_S)
            done.result(BOUND_S)
            return batch.tokens

        def sample() -> int:
            return draw(sampler, workloads.prompts[0], 8, sizes.new_tokens)

        sample()
        (train_alone,) = _watch([train], sizes.alone_s)
        (sample_alone,) = _watch([sample], sizes.alone_s)
        train_together, sample_together = _watch([train, sample], sizes.together_s)
    return MixedResult(Pair(train_together, train_alone), Pair(sample_together, sample_alone))


def _step(side: Side, batch: Batch) -> tuple[float, float]:
    """Seconds of a forward_backward and its mean logprob; the gradient is then used up."""
    trained = side.forward_backward(batch)
    side.optim_step()
    return trained.seconds, trained.mean_logprob


Job = Callable[[int], int]


def _at_once(jobs: Sequence[Job], new_tokens: int) -> float:
    tokens: list[int] = []
    threads = [
        threading.Thread(target=lambda job=job: tokens.append(job(new_tokens))) for job in jobs
    ]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    assert len(tokens) == len(jobs), "a client failed; its error stands above"
    return sum(tokens) / seconds


def _in_turn(jobs: Sequence[Job], new_tokens: int) -> float:
    began = time.perf_counter()
    tokens = sum(job(new_tokens) for job in jobs)
    return tokens / (time.perf_counter() - began)


@dataclass
class _Load:
    """Work that is repeated; see `_watch`."""

    work: Callable[[], int]
    tokens_per_s: float | None = None
    error: list[BaseException] = field(default_factory=list)


def _watch(works: Sequence[Callable[[], int]], window_s: float) -> list[float]:
    """Tokens/s of each work while all of them go on, over at least `window_s`.

    Each is measured up to the end of the first call that ends behind the window, and goes on
    until the last is measured: so none of them ever has the server to itself.
    """
    loads = [_Load(work) for work in works]
    threads = [threading.Thread(target=_repeat, args=(load, loads, window_s)) for load in loads]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for load in loads:
        for error in load.error:
            raise error
    return [load.tokens_per_s or 0.0 for load in loads]


def _repeat(load: _Load, loads: Sequence[_Load], window_s: float) -> None:
    began = time.perf_counter()
    tokens = 0
    try:
        while any(other.tokens_per_s is None for other in loads):
            tokens += load.work()
            seconds = time.perf_counter() - began
            if load.tokens_per_s is None and seconds >= window_s:
                load.tokens_per_s = tokens / seconds
    except BaseException as error:  # handed to _watch, which raises it in the main thread
        load.error.append(error)
        for other in loads:
            other.tokens_per_s = other.tokens_per_s or 0.0
