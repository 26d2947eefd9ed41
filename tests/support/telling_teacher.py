"""A teacher without a model, whose hidden states tell which tokens they are of, and many questions for it.

    python tests/support/telling_teacher.py 10000

asks a server in a process of its own, and prints how much memory that has after a tenth of the questions and after all.
"""

from __future__ import annotations

import multiprocessing
import random
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch

from cmdp_fast.heads import Head
from cmdp_fast.teachers.open import open_teacher
from cmdp_fast.teachers.served.server import TeacherServer
from cmdp_fast.teachers.teacher import Teacher, TeacherAbout, TeacherOutputs, head_digest

VOCAB, WIDTH = 1000, 4
VOCABULARY = {f"t{i}": i for i in range(VOCAB)}


def telling(rows: Sequence[Sequence[int]], wanted: Sequence[int]) -> torch.Tensor:
    """Of each token itself, its place, the sum of those before it, and the row's first: whole numbers of float32."""
    hidden = torch.zeros(sum(wanted), WIDTH)
    at = 0
    for row, count in zip(rows, wanted, strict=True):
        if count:
            ids = torch.tensor(row, dtype=torch.float32)
            every = torch.stack([ids, torch.arange(len(row)).float(), ids.cumsum(0), ids[:1].expand(len(row))], 1)
            hidden[at : at + count] = every[len(row) - count :]
            at += count
    return hidden


class TellingTeacher(Teacher):
    """Answers with `telling`; ``seconds`` of sleep for each question, and a ``change`` of what it says."""

    def __init__(self, seconds: float = 0.0, name: str = "telling", seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.head = Head(torch.randn(VOCAB, WIDTH, generator=generator))
        self.about = TeacherAbout(
            *("hidden", name, "", "float32", VOCAB, WIDTH, "0" * 64, head_digest(self.head)), positions=512
        )
        self.seconds, self.asked = seconds, list[tuple[int, ...]]()
        self.change: Any = lambda hidden: hidden

    def answer(self, rows: Sequence[Sequence[int]], wanted: Sequence[int]) -> TeacherOutputs:
        self.asked.append(tuple(map(len, rows)))
        time.sleep(self.seconds)
        return TeacherOutputs(hidden=self.change(telling(rows, wanted)), head=self.head)


def question(generator: random.Random, most: int = 300) -> tuple[list[list[int]], list[int]]:
    """Some rows, 0 to 6 of 0 to ``most`` tokens, mostly short."""
    rows = [
        generator.choices(range(VOCAB), k=int(most * generator.random() ** 3)) for _ in range(generator.randrange(7))
    ]
    return rows, [generator.randint(0, len(row)) for row in rows]


def ask_many(url: str, questions: int, threads: int = 4, seed: int = 0) -> int:
    """Asks so many questions from several threads, half of them through one client, and checks every number; how many
    were asked."""
    clients = [open_teacher(f"served:{url}") for _ in range(1 + threads // 2)]
    done, wrong = [0] * threads, list[str]()

    def ask(number: int) -> None:
        generator = random.Random(1000 * seed + number)
        teacher = clients[min(number, len(clients) - 1)]
        try:
            while done[number] < questions // threads:
                rows, wanted = question(generator)
                hidden = teacher.answer(rows, wanted).as_hidden()
                if not torch.equal(hidden, telling(rows, wanted)):
                    wrong.append(f"thread {number}, question {done[number]}")
                    return
                done[number] += 1
        except Exception as error:  # it ends the thread, and has to end the test
            wrong.append(repr(error))

    running = [threading.Thread(target=ask, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    for client in clients:
        client.close()
    assert not wrong, wrong
    return sum(done)


def _serve(urls: Any, over: Any) -> None:
    server = TeacherServer(TellingTeacher(), VOCABULARY, batch_tokens=2048, merge=True).start()
    urls.put(server.url)
    over.wait()
    server.close()


def main(questions: int) -> None:
    """Prints the memory of a server, in MB, after a tenth of the questions and after all."""
    import psutil

    spawning = multiprocessing.get_context("spawn")
    urls, over = spawning.Queue(), spawning.Event()
    process = spawning.Process(target=_serve, args=(urls, over))
    process.start()
    url, server, asked = urls.get(timeout=120), psutil.Process(process.pid), 0
    for part in (questions // 10, questions - questions // 10):
        since = time.monotonic()
        asked += ask_many(url, part, seed=asked)
        seconds = time.monotonic() - since
        print(
            f"{asked} questions asked, all answers right, {part / seconds:.0f}/s; the server has "
            f"{server.memory_info().rss / 1e6:.1f} MB, {server.num_threads()} threads, {server.num_fds()} files; the "
            f"client {psutil.Process().memory_info().rss / 1e6:.1f} MB"
        )
    over.set()
    process.join()


if __name__ == "__main__":
    main(int(sys.argv[1]))
