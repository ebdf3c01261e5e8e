"""Which replica a request goes to, where several servers answer together. Pure: no clock, no network, no state.

Each lane has a winner:

- **Searches: load wins.** Somebody waits, so a search goes where it is expected to be answered first. Under bulk that
  is where the running forward pass ends first: a replica that has just answered has just begun another pass. Affinity
  only breaks ties: among replicas that would answer about equally soon, equal texts meet again.
- **Bulk: affinity wins, up to a cap.** A text goes where it went the last time, so that each replica's cache stays warm
  and replicas do not all keep the same vectors. Only a replica that has more than `BALANCE` times its share of all the
  work gives up its turn, to the next one in the key's own order. So a hot text or job cannot bury one replica, and no
  keys move but those of the replica that is full. And none idles while another one has `PATIENCE` passes to do.

Sources: rendezvous hashing, https://doi.org/10.1109/90.663936; bounded loads, https://arxiv.org/abs/1608.01350; the
power of two choices, https://doi.org/10.1109/71.963420; min-wise hashes, https://doi.org/10.1006/jcss.1999.1690.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from math import floor, inf, isfinite, log
from random import Random

from vecmill.core.types import Lane

ABOUT_EQUAL = 1.1
"""Times the shortest expected wait: replicas within it are about as good, and the key decides between them."""
BALANCE = 2.0
"""Times its share that a replica may have queued before bulk goes elsewhere. 1.25 loses a third of the cache's hits, as
requests are few and large; without a bound a slow card holds everything up (`benchmarks/cluster/routing.py`)."""
PATIENCE = 6.0
"""Forward passes that a text waits for its own replica while another one has nothing to do. With four requests for each
replica this gives new texts 98 % of what the replicas can do instead of 94 %, and finds 6 of 100 known ones less."""
DRIFT = 0.12
"""Share of a forward pass by which its end may be off from where it is expected, and again for each pass since the last
answer: none takes exactly what the fit says. Half a pass off is not to know anything."""
LEAST_ANSWER_SECONDS = 0.001
"""Of the time that an answer says it took (`x-total-time`): what took less came from the cache, without a pass."""
HASHED_CHARACTERS = 4096
"""Of each text: chunks that are longer and equal up to there go the same way, which is no harm."""

_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Replica:
    """What is known of one server, for one model.

    Queued tokens are those that wait or run. What it said last is out of date as soon as something was sent to it: the
    caller adds what it has sent since then.
    """

    name: str
    """Its own among all, and the same for as long as it lives: keys are hashed with it."""
    fixed_seconds: float
    """Of a forward pass, whatever is in it. As `seconds_per_token` from the line that warm-up measured."""
    seconds_per_token: float
    """Above 0."""
    queued_interactive: int = 0
    queued_bulk: int = 0
    max_batch_tokens: int = 4096
    """Tokens of a bulk forward pass: the most bulk that a search finds before it."""
    since_answer: float | None = None
    """Seconds since its `LastAnswer`: a pass ended then, and where bulk waited, another one began. None: unknown."""
    rest_of_pass: float | None = None
    """Seconds that the pass that ran when it answered still took then, by its answer; None: a pass of bulk began."""
    overhead_seconds: float = 0.0
    """Between here and its queue, both ways together: the pass ended earlier than its answer came, and what is sent now
    waits from later on."""
    draining: bool = False
    """It gets nothing any more."""
    weight: float = 1.0
    """Its share of all keys, relative to the others'; above 0. A change moves keys: take a number for the kind of card
    rather than a measured speed."""

    @property
    def queued(self) -> int:
        """Tokens of both lanes."""
        return self.queued_interactive + self.queued_bulk

    @property
    def queued_seconds(self) -> float:
        """How long it will work on what it has."""
        return self.seconds_per_token * self.queued


@dataclass(frozen=True, slots=True)
class LastAnswer:
    """The last answer of a replica that took a forward pass, as whoever sends to it saw it come."""

    at: float = -inf
    """When it came, by the clock of who saw it; -inf: none has come."""
    rest_of_pass: float = 0.0
    """Seconds that the pass that ran then still took (`x-rest-of-pass`)."""
    overhead_seconds: float = 0.0
    """Of the last search: the time outside the replica's queue and pass."""

    def followed_by(self, lane: Lane, sent: float, came: float, took: float, rest_of_pass: float) -> LastAnswer:
        """After one more answer; the same where that came from the cache.

        Args:
            sent: when its request was sent, as `came` by the clock of `at`.
            took: seconds that the replica says that it took (`x-total-time`).
        """
        if took < LEAST_ANSWER_SECONDS:
            return self
        overhead = max(0.0, came - sent - took) if lane is Lane.INTERACTIVE else self.overhead_seconds
        return LastAnswer(came, rest_of_pass, overhead)

    def since(self, now: float) -> float | None:
        """Seconds; None where none has come."""
        return now - self.at if isfinite(self.at) else None


@dataclass(frozen=True, slots=True)
class RoutedRequest:
    """One request, as far as its way depends on it."""

    lane: Lane
    tokens: int
    """By estimate."""
    key: int
    """64 bits of `affinity_key`."""


Policy = Callable[[Sequence[Replica], RoutedRequest], Replica | None]
"""Gives the replica for a request; None where all are draining, or there are none."""


def choose(replicas: Sequence[Replica], work: RoutedRequest) -> Replica | None:
    """The replica for a request: `shortest_wait` for a search, `owner` for bulk. None where all are draining."""
    return shortest_wait(replicas, work) if work.lane is Lane.INTERACTIVE else owner(replicas, work)


def expected_wait(replica: Replica, work: RoutedRequest) -> float:
    """Seconds until the replica has the answer: `fixed_seconds + seconds_per_token * (tokens ahead + own tokens)`.

    Ahead of bulk is everything; ahead of a search are other searches, and `rest_of_pass`.
    """
    if work.lane is Lane.INTERACTIVE:
        own = replica.fixed_seconds + replica.seconds_per_token * (replica.queued_interactive + work.tokens)
        return own + rest_of_pass(replica)
    return replica.fixed_seconds + replica.seconds_per_token * (replica.queued + work.tokens)


def rest_of_pass(replica: Replica) -> float:
    """Seconds that a search waits there for the end of a forward pass of bulk, on average; half a pass if it is unknown
    when that began.

    A pass that is about to end may have given way to the next one when the search arrives, and one that has just begun
    may still be the one before: within the time that is uncertain (`DRIFT`), both are averaged.
    """
    tokens = min(replica.queued_bulk, replica.max_batch_tokens)
    seconds = replica.fixed_seconds + replica.seconds_per_token * tokens
    if not tokens or replica.since_answer is None:
        return seconds / 2 if tokens else 0.0
    rest = seconds if replica.rest_of_pass is None else replica.rest_of_pass
    over = (replica.since_answer + replica.overhead_seconds - rest) / seconds  # negative: the same pass still runs
    ended = max(0, floor(over) + 1)
    begun = over + 1 - ended
    uncertain_end = min(0.5, DRIFT * (1 + ended))
    uncertain_begin = min(0.5, DRIFT * ended)  # that of the answer is certain
    missed = max(0.0, 1 - (1 - begun) / uncertain_end) / 2
    still_before = max(0.0, 1 - begun / uncertain_begin) / 2 if uncertain_begin else 0.0
    return seconds * (1 - begun + missed - still_before)


def shortest_wait(replicas: Iterable[Replica], work: RoutedRequest) -> Replica | None:
    """The replica with the shortest expected wait; of those about equal, the one that the key prefers.

    Given two at random (`sampled`), this is the power of two choices.
    """
    waits = [(expected_wait(replica, work), replica) for replica in replicas if not replica.draining]
    shortest = min((wait for wait, _ in waits), default=inf)
    return _preferred([replica for wait, replica in waits if wait <= ABOUT_EQUAL * shortest], work.key)


def sampled(replicas: Sequence[Replica], random: Random, count: int = 2) -> list[Replica]:
    """`count` of those that are not draining, at random; all of them where there are no more."""
    available = [replica for replica in replicas if not replica.draining]
    return random.sample(available, min(count, len(available)))


def owner(
    replicas: Iterable[Replica], work: RoutedRequest, balance: float = BALANCE, patience: float = PATIENCE
) -> Replica | None:
    """The replica that the key prefers among those below their cap, by rendezvous hashing with bounded loads.

    Where that one has more than `patience` passes to do, it is the one that the key prefers of those that do nothing.

    Another replica that comes or goes moves only the keys that it takes or leaves, about one of n.
    """
    available = [replica for replica in replicas if not replica.draining]
    if not available:
        return None
    most = cap(available, work.tokens, balance)
    chosen = _preferred([each for each in available if each.queued_seconds <= max(most, one_pass(each))], work.key)
    if chosen is None or chosen.queued_seconds <= patience * one_pass(chosen):
        return chosen
    return _preferred([each for each in available if not each.queued], work.key) or chosen


def cap(replicas: Sequence[Replica], tokens: int, balance: float = BALANCE) -> float:
    """The most seconds of work that a replica may have queued for bulk to be added, if that is more than `one_pass`.

    It is `balance` times what each had if all the work, `tokens` more included, were divided by speed. At least one
    replica is always below it.
    """
    speed = sum(1 / replica.seconds_per_token for replica in replicas)
    return balance * (sum(replica.queued for replica in replicas) + tokens) / speed


def one_pass(replica: Replica) -> float:
    """Seconds of a full bulk pass: so much queued work never counts against a replica, as without it it would idle."""
    return replica.seconds_per_token * replica.max_batch_tokens


def affinity_key(texts: Iterable[str], job: str = "") -> int:
    """64 bits, equal for equal work: the smallest hash of any of the texts; of `job` alone where there are none.

    Two requests with most texts in common mostly have the same key (the probability is their common share of all their
    texts): a chunk that is inserted moves the borders of all later requests of an index, but hardly their keys.

    `job`: a name that stays the same from one run of an index to the next. The id of a job is new at each run: with it
    in the key, the second run would find nothing warm.
    """
    salt = blake2b(job.encode("utf-8", "replace"), digest_size=16).digest()
    smallest = min((_digest(text[:HASHED_CHARACTERS], salt) for text in texts), default=None)
    return int.from_bytes(salt[:8]) if smallest is None else int.from_bytes(smallest)


def _digest(text: str, salt: bytes = b"") -> bytes:
    return blake2b(text.encode("utf-8", "replace"), digest_size=8, salt=salt).digest()


def _preferred(replicas: Sequence[Replica], key: int) -> Replica | None:
    """The replica with the highest score for the key; equal scores do not happen with 64 bits."""
    return max(replicas, key=lambda replica: _score(replica, key), default=None)


def _score(replica: Replica, key: int) -> float:
    """`-weight / ln(u)`, u in (0, 1) from a hash of name and key: the highest score in proportion to the weight."""
    mixed = _mixed(key ^ _hash_of_name(replica.name))
    return -replica.weight / log(((mixed >> 12) + 0.5) / 2**52)


@lru_cache(maxsize=4096)
def _hash_of_name(name: str) -> int:
    return int.from_bytes(_digest(name))


def _mixed(value: int) -> int:
    """A hash of 64 bits. Source: splitmix64, https://prng.di.unimi.it/splitmix64.c"""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
