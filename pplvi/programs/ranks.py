"""The processes that work together: one alone, or the ranks of a ``torch.distributed`` group."""

from __future__ import annotations

import atexit
import os
import pickle
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from pplvi.programs.shard import mean_over
from pplvi.programs.state import fingerprint

T = TypeVar("T")


class RankLostError(RuntimeError):
    """Another rank has ended, or has not answered within the group's time limit."""


class RanksLeftError(KeyboardInterrupt):
    """Ctrl-C for the second time: this rank has left the others, which lose it at once."""


class Processes:
    """One process, which has nobody to ask.

    >>> Processes().any(True), Processes().gather("here")
    (True, ['here'])
    """

    rank = 0
    size = 1
    interrupted = False

    def any(self, flag: Any) -> bool:
        """Whether it is true on any rank."""
        return bool(flag)

    def mean(self, number: float) -> float:
        """The mean of a number over the ranks."""
        return number

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order."""
        return [value]

    def first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on every rank; what it raises, too."""
        return make()

    def each(self, make: Callable[[], T]) -> list[T]:
        """What every rank makes, in their order; what one of them raises is raised on all."""
        return [make()]

    def share(self, total: int) -> range:
        """Which of so many pieces of work are this rank's: every ``size``-th.

        >>> Processes().share(3)
        range(0, 3)
        """
        return range(total)[self.rank :: self.size]

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, Ctrl-C ends all ranks at the same step."""
        yield


class ProcessGroup(Processes):
    """The ranks of a process group. Every method is a collective: all ranks call it, in the same order."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        gloo = "gloo" in str(dist.get_backend_config(group))
        self.device = torch.device("cpu") if gloo else torch.device("cuda", torch.cuda.current_device())
        self.interrupted = False

    def any(self, flag: Any) -> bool:
        """Whether it is true on any rank."""
        return any(self.gather(bool(flag)))

    def any_answer(self, ask: Callable[[], Any]) -> bool:
        """Whether what is asked is true on any rank.

        :raises KeyboardInterrupt: on all ranks, if any was interrupted so far, or is while it answers.
        """
        try:
            answer = bool(ask())
        except RanksLeftError:
            raise
        except KeyboardInterrupt:
            answer, self.interrupted = False, True
        found = self.gather((answer, self.interrupted))
        self.obey(any(interrupted for _, interrupted in found))
        return any(answer for answer, _ in found)

    def obey(self, interrupted: bool) -> None:
        """End what all ranks are in, if one of them was interrupted, as all have heard now.

        :raises KeyboardInterrupt: if so.
        """
        if interrupted:
            self.interrupted = False
            raise KeyboardInterrupt

    def mean(self, number: float) -> float:
        """The mean of a number over the ranks."""
        return float(self.mean_of(torch.tensor(number, dtype=torch.float64, device=self.device)))

    def mean_of(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over the ranks."""
        with heard():
            return mean_over(tensor, self.group, self.size)

    def sums(self, *numbers: int) -> list[int]:
        """Sums of whole numbers over the ranks."""
        tensor = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        with heard():
            dist.all_reduce(tensor, group=self.group)
        return [int(x) for x in tensor.tolist()]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order."""
        found: list[Any] = [None] * self.size
        with heard():
            dist.all_gather_object(found, value, group=self.group)
        return found

    def first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on every rank; what it raises, too."""
        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = make()
            except Exception as error:  # of whatever kind: it is raised on all ranks
                box[1] = error
        with heard():
            dist.broadcast_object_list(box, group=self.group, group_src=0)
        if box[1] is not None:
            raise box[1]
        made: T = box[0]
        return made

    def each(self, make: Callable[[], T]) -> list[T]:
        """What every rank makes, in their order; what one of them raises is raised on all."""
        made: T | None = None
        failed: BaseException | None = None
        try:
            made = make()
        except RanksLeftError:
            raise
        except (Exception, KeyboardInterrupt) as error:  # of whatever kind: the others have to hear of it
            failed = error
        found = self.gather((made, _sendable(failed)))
        if failed is not None:
            raise failed
        if (theirs := next((error for _, error in found if error is not None), None)) is not None:
            raise theirs
        return [cast(T, made) for made, _ in found]

    def spread(self, tensors: list[Tensor]) -> None:
        """Give every rank the values that rank 0 has."""
        with heard(), torch.no_grad():
            for tensor in tensors:
                dist.broadcast(tensor, group=self.group, group_src=0)

    def agree(self, value: Any) -> bool:
        """Whether all ranks have the same."""
        return len(set(self.gather(value))) == 1

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, Ctrl-C is kept until the ranks meet next, or to the end; at a second one this rank leaves the others.

        Where the process ignores it, as one that a shell has put in the background, it is ignored here too.

        :raises KeyboardInterrupt: in the end, if it came after the ranks had met for the last time.
        """
        before = signal.getsignal(signal.SIGINT)
        elsewhere = threading.current_thread() is not threading.main_thread()
        if elsewhere or before in (None, signal.SIG_IGN):  # None: what handles it is not Python's to put back
            yield
            return

        def keep(number: int, frame: Any) -> None:
            if self.interrupted:
                _leave()
                raise RanksLeftError
            self.interrupted = True

        signal.signal(signal.SIGINT, keep)
        try:
            yield
        finally:
            late, self.interrupted = self.interrupted, False
            signal.signal(signal.SIGINT, before)
        if late:
            raise KeyboardInterrupt


def _sendable(error: BaseException | None) -> BaseException | None:
    """An error that another process can read."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # of whatever kind: user's errors hold what they like
        return (ValueError if isinstance(error, ValueError) else RuntimeError)(str(error))
    return error


_LOST = ("gloo", "pair closure", "Connection closed", "Timed out")  # what gloo says, in plain RuntimeErrors


@contextmanager
def heard() -> Iterator[None]:
    """Say in words that another rank is gone."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or any(words in str(error) for words in _LOST)):
            raise
        raise RankLostError(
            f"rank {dist.get_rank()}: another rank of the process group has ended or did not answer in time "
            f"({str(error).strip().splitlines()[0]}). What was trained since the last checkpoint is lost: start all "
            "ranks again with resume=; torchrun --max-restarts does so by itself."
        ) from error


def join(timeout: float | None = None) -> Processes:
    """The group that there is, or that torchrun's environment describes; one process if there is neither.

    :param timeout: seconds after which a rank that does not answer counts as lost, where the group is made here.
    """
    if not dist.is_available():
        return Processes()
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
            return Processes()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        limit = None if timeout is None else timedelta(seconds=timeout)
        options: dict[str, Any] = {} if limit is None else {"timeout": limit}
        store, rank, size = next(rendezvous("env://", **options))
        met = dist.PrefixStore(met_as(store, rank, size), store)  # type: ignore[attr-defined]
        dist.init_process_group(store=met, rank=rank, world_size=size, timeout=limit)
        atexit.register(_leave)
    return ProcessGroup(dist.group.WORLD) if dist.get_world_size() > 1 else Processes()


def met_as(store: Any, rank: int, size: int) -> str:
    """A name that the ranks of this start agree on, in a store that may hold what those of earlier ones have left.

    ``torchrun`` keeps its store over restarts, and torch puts the addresses of ranks there under the same keys: a rank
    that comes first would take those of ranks that have ended, and wait for them. Here every rank says who it is by a
    number of its own, and rank 0 asks until all of them have found theirs in its answer.

    :raises RankLostError: if a rank does not come within the store's time limit.
    """
    own, seconds = secrets.token_hex(8), store.timeout.total_seconds()
    store.set(f"pplvi/rank {rank}", own)
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if rank == 0:
            names = [f"pplvi/rank {other}" for other in range(size)]
            if store.check(names):
                store.set("pplvi/all", " ".join(store.get(name).decode() for name in names))
                if store.add(f"pplvi/{own}", 0) == size - 1:
                    return own
        elif store.check(["pplvi/all"]):
            found = store.get("pplvi/all").decode().split()
            if len(found) == size and found[rank] == own:
                store.add(f"pplvi/{found[0]}", 1)
                return found[0]
        time.sleep(0.02)
    raise RankLostError(
        f"rank {rank}: the {size} ranks did not meet within {seconds:g} s: expected all of them to begin together."
    )


def common_seed(ranks: Processes, seed: int | None, call: Any) -> int | None:
    """The seed that all ranks count from; in one process the one that was given, or none.

    :raises ValueError: if the ranks were given different data or seeds.
    """
    if ranks.size == 1:
        return seed
    if len(set(ranks.gather(fingerprint((call, seed))))) > 1:
        raise ValueError(
            "the ranks were given different data or seeds: chains, islands, restarts and draws are spread over ranks "
            "that have the same full data and seed=. Expected those, or parallel='none', which keeps ranks apart."
        )
    return ranks.first(lambda: int(torch.randint(2**31, ()))) if seed is None else seed


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
