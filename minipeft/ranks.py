"""Several processes, one store: who trains whom, and how finished adapters come to the one who writes.

    torchrun --nproc-per-node 3 -m minipeft train ...

Every rank has the whole frozen base, an engine and users of its own; no gradient ever leaves a rank, so they need not
keep step. Rank 0 alone writes the store: the others send it what is finished, as bytes of safetensors, over gloo. Ranks
on GPUs do the same: nothing that is sent lies on a GPU, so NCCL would have nothing to do. The store's folder need not
be shared between machines. If a rank dies, torchrun (--max-restarts) starts all of them again, and with --resume they
go on. On several machines that needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: a new meeting place after each restart.
"""

import heapq
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from minipeft.errors import InputError

FOREVER = timedelta(days=365)  # ranks wait for each other as long as users train; a dead one's connection closes
LEFT = -1  # in place of a size: the sender stops before its users are done


class Gone(RuntimeError):
    """Another process of this training went away before it had ended."""


@contextmanager
def connected() -> Iterator[None]:
    """Inside, a connection that breaks is Gone."""
    try:
        yield
    except RuntimeError as error:
        raise Gone("another process of this training went away before it had ended") from error


def share_out(users: Sequence[str], sizes: Sequence[int], num_ranks: int) -> list[list[str]]:
    """Each rank's users, in the order given: a function of its arguments alone.

    Largest first, each to the rank that has least so far (Graham 1969): no rank has more than 4/3 of what is possible.
    """
    loads = [(0, rank) for rank in range(num_ranks)]
    owners = {}
    for i in sorted(range(len(users)), key=lambda i: -sizes[i]):
        load, rank = heapq.heappop(loads)
        owners[i] = rank
        heapq.heappush(loads, (load + sizes[i], rank))
    shares = [[] for _ in range(num_ranks)]
    for i, user in enumerate(users):
        shares[owners[i]].append(user)
    return shares


def own_device(device: str) -> str:
    """Which of a machine's GPUs is this process's, where `device` says only that it is one."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device


class Ranks:
    """One process of several, or the only one.

    rank: 0 is the one that writes. number: how many there are.
    """

    def __init__(self, rank: int = 0, number: int = 1):
        self.rank, self.number = rank, number
        self._arrived: queue.SimpleQueue[bytes | Gone] = queue.SimpleQueue()
        self._speaking, self._gone = 0, None  # how many others may still send

    @property
    def writes(self) -> bool:
        return self.rank == 0

    def tell(self, content: bytes = b"", teller: int = 0) -> bytes:
        """What the teller says, at every rank. All must call it."""
        if self.number == 1:
            return content
        with connected():
            size = torch.tensor([len(content)])
            dist.broadcast(size, teller)
            data = torch.zeros(int(size), dtype=torch.uint8)
            if self.rank == teller:
                data = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else data
            dist.broadcast(data, teller)
        return data.numpy().tobytes()

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Around what rank 0 does alone before the ranks agree what to train: if it raises InputError, rank 0 tells the
        others nothing instead of that, and they end as well."""
        try:
            yield
        except InputError:
            if self.writes:
                with suppress(Gone):  # who found a fault too has ended
                    self.tell()
            raise

    def listen(self) -> None:
        """At rank 0: take in what the others send, while this rank trains. After this nobody calls `tell`."""
        if self.writes and self.number > 1:
            self._speaking = self.number - 1
            threading.Thread(target=self._receive, daemon=True).start()

    def _receive(self) -> None:
        speaking = self.number - 1
        try:
            with connected():
                while speaking:
                    size = torch.zeros(1, dtype=torch.int64)
                    sender = dist.recv(size)
                    data = torch.zeros(max(int(size), 0), dtype=torch.uint8)
                    if len(data):
                        dist.recv(data, sender)
                    speaking -= not len(data)
                    left = int(size) == LEFT
                    self._arrived.put(Gone(f"process {sender} was stopped") if left else data.numpy().tobytes())
        except Gone as gone:  # raised again by `check`, in the thread that trains; nobody is heard any more
            for _ in range(speaking):
                self._arrived.put(gone)

    def send(self, content: bytes) -> None:
        """To rank 0, from another; nothing at all says that this rank has ended."""
        with connected():
            dist.send(torch.tensor([len(content)]), 0)
            if content:
                dist.send(torch.frombuffer(bytearray(content), dtype=torch.uint8), 0)

    def leave(self) -> None:
        """Tell rank 0, from another, that this rank stops before its users are done."""
        with suppress(Gone):  # rank 0 need not know then
            with connected():
                dist.send(torch.tensor([LEFT]), 0)

    def arrived(self) -> Iterator[bytes]:
        """At rank 0: what has come since the last call."""
        while not self._arrived.empty():
            content = self._arrived.get()
            if isinstance(content, Gone):
                self._gone = content
            if isinstance(content, Gone) or not content:
                self._speaking -= 1
            else:
                yield content

    def check(self) -> None:
        """At rank 0: raises Gone if another rank is, once `arrived` gave all that came before."""
        if self._gone is not None:
            raise self._gone

    @property
    def all_ended(self) -> bool:
        """At rank 0: whether nobody is left to be heard."""
        return self._speaking == 0


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that torchrun started; without torchrun, the only one."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Ranks()
        return
    store, rank, number = next(dist.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":  # one machine: its count of restarts is everybody's
        # torchrun's store outlives a restart, and the addresses of those who died are still in it.
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=number, timeout=FOREVER)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
