"""A synthetic run with the shape of a real one: workers that come, wait for each other, and lose work."""

import math
import random
from collections.abc import Callable

import pytest

from metaflow_hf import events as ev


def make_run(
    *,
    workers: int = 3,
    rounds: int = 40,
    claims_per_round: int = 8,
    steps_per_claim: int = 2,
    tokens_per_step: int = 4096,
    start: float = 1_700_000_000.0,
    seed: int = 0,
    positions_left: int = 0,
) -> list[ev.Event]:
    rng = random.Random(seed)
    attempts = [f"{rng.getrandbits(64):016x}" for _ in range(workers)]
    planned = rounds * claims_per_round * workers * steps_per_claim * tokens_per_step
    positions_total = rounds * claims_per_round * workers + positions_left
    now, committed, position, step = start, 0, 0, dict.fromkeys(attempts, 0)
    run: list[ev.Event] = [ev.Notice(time=now, message="chunk_size auto: 2048 tokens fit in 1.9 GiB")]
    for number in range(rounds):
        finish, losses = [], []
        for worker in attempts:
            clock, own = now, 0
            for _ in range(claims_per_round):
                for _ in range(steps_per_claim):
                    seconds = rng.uniform(0.08, 0.14)
                    clock += seconds
                    own += tokens_per_step
                    step[worker] += 1
                    share = (committed + own * workers) / planned
                    loss = 2.6 + 5.7 * math.exp(-6 * share) + rng.gauss(0, 0.12)
                    losses.append(loss)
                    run.append(
                        ev.StepDone(
                            time=clock,
                            worker=worker,
                            round=number,
                            step=step[worker],
                            loss=loss,
                            learning_rate=3e-4
                            * min(1, share / 0.05)
                            * (0.55 + 0.45 * math.cos(math.pi * min(1, share))),
                            tokens=tokens_per_step,
                            seconds=seconds,
                            tokens_total=committed + own,
                            tokens_planned=planned,
                            memory_bytes=int(1.1e9 + 2e8 * rng.random()),
                        )
                    )
                run.append(
                    ev.ClaimDone(
                        time=clock,
                        worker=worker,
                        round=number,
                        position=position,
                        tokens=own,
                        loss=losses[-1],
                    )
                )
                position += 1
            run.append(
                ev.DeltaPublished(
                    time=clock,
                    worker=worker,
                    round=number,
                    positions=claims_per_round,
                    tokens=own,
                    bytes=3_000_000,
                    seconds=0.05,
                )
            )
            finish.append((worker, clock))
        end = max(clock for _, clock in finish) + 0.1
        tokens = claims_per_round * steps_per_claim * tokens_per_step * workers
        committed += tokens
        for worker, clock in finish:
            run.append(
                ev.RoundClosed(
                    time=end,
                    worker=worker,
                    round=number,
                    contributors=workers,
                    tokens=tokens,
                    tokens_total=committed,
                    positions_done=position,
                    positions_total=positions_total,
                    loss=sum(losses) / len(losses),
                    seconds=end - now,
                    waited_seconds=end - clock,
                    final=number == rounds - 1,
                )
            )
        if number and number % 4 == 0:
            share = committed / planned
            run.append(
                ev.Evaluated(
                    time=end,
                    worker=attempts[0],
                    name="held_out",
                    loss=2.75 + 5.5 * math.exp(-6 * share),
                    perplexity=math.exp(2.75 + 5.5 * math.exp(-6 * share)),
                    bits_per_byte=1.2,
                    tokens=52_341,
                    bytes=187_212,
                    round=number,
                    tokens_total=committed,
                )
            )
            run.append(
                ev.Sampled(
                    time=end,
                    worker=attempts[0],
                    name="held_out",
                    prompt="The function returns",
                    text=f" a value of round {number}",
                    round=number,
                )
            )
        if number == rounds // 2:
            run.append(
                ev.WorkLost(time=end, round=number, positions=1, reason="worker stopped; another claims it")
            )
        now = end
    run.sort(key=lambda event: event.time)
    return run


HOSTILE = "a|b <img src=x onerror=\"document.title='owned'\"> **bold** `code` </div></pre>\n\n# head\n\x1b[31m[l](javascript:alert(1)) &lt; ünï 日本"


def make_results(time: float) -> list[ev.Event]:
    def evaluated(name: str, loss: float, bits: float) -> ev.Evaluated:
        return ev.Evaluated(
            time=time,
            name=name,
            loss=loss,
            perplexity=math.exp(loss),
            bits_per_byte=bits,
            tokens=52_341,
            bytes=187_212,
        )

    return [
        evaluated("before", 8.32, 3.356),
        evaluated("after", 2.71, 1.093),
        evaluated("unigram", 6.05, 2.441),
        ev.Sampled(time=time, name="before", prompt="The function returns", text="lá ;;q rrr cla cla\n" * 3),
        ev.Sampled(
            time=time,
            name="after",
            prompt="The function returns",
            text=" a list of strings, one per line. If *maxsplit* is given,\nat most *maxsplit* splits are done.",
        ),
        ev.Sampled(time=time, name="before", prompt="<b>|", text=HOSTILE),
        ev.Sampled(time=time, name="after", prompt="<b>|", text=HOSTILE),
    ]


@pytest.fixture
def run_events() -> Callable[..., list[ev.Event]]:
    return make_run


@pytest.fixture
def results() -> list[ev.Event]:
    return make_results(1_700_000_100.0)


@pytest.fixture
def hostile() -> str:
    return HOSTILE
