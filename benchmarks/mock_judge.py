"""A server that speaks OpenAI's chat protocol on 127.0.0.1, answers at once, and misbehaves as it is told to.

It runs in a process of its own, from the standard library alone. Faults are drawn from the question itself, so that the
same question meets the same one: those of the server (429, 500, silence, a closed connection, JSON that is cut off) on
the first attempt only, those of the model (refusal, nonsense) on all. It notes which feature each question is about, by
the first ``f123x`` in it, and what it answered.
"""

import asyncio
import contextlib
import hashlib
import json
import multiprocessing
import re
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

PASSING = ("429", "500", "silence", "closed", "cut off")
LASTING = ("refusal", "nonsense")


@dataclass(frozen=True)
class MockJudge:
    """A running server.

    Attributes:
        url: for ``base_url``.
    """

    url: str

    def stats(self) -> dict[str, Any]:
        """``answered`` and ``faults`` so far; ``log``: ``[feature, key of the question, what was done]`` in order."""
        with urllib.request.urlopen(f"{self.url}/stats", timeout=60) as answer:
            return dict(json.load(answer))


@contextlib.contextmanager
def mock_judge(faults: Mapping[str, float] | None = None, delay: float = 0.0) -> Iterator[MockJudge]:
    """Run a server for the time of a ``with`` block.

    Args:
        faults: share of the questions that meet each of ``PASSING`` and ``LASTING``.
        delay: seconds before each answer.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(dict(faults or {}), delay, sender), daemon=True)
    process.start()
    try:
        if not receiver.poll(60):
            raise RuntimeError("the mock judge did not start")
        yield MockJudge(f"http://127.0.0.1:{receiver.recv()}/v1")
    finally:
        process.terminate()
        process.join(10)


def _serve(faults: dict[str, float], delay: float, sender: Any) -> None:
    asyncio.run(_Server(faults, delay).run(sender))


class _Server:
    def __init__(self, faults: dict[str, float], delay: float) -> None:
        self.faults, self.delay = faults, delay
        self.attempts: dict[str, int] = {}
        self.log: list[tuple[str, str, str]] = []

    async def run(self, sender: Any) -> None:
        server = await asyncio.start_server(self.connection, "127.0.0.1", 0)
        sender.send(server.sockets[0].getsockname()[1])
        async with server:
            await server.serve_forever()

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                length = re.search(r"content-length: *(\d+)", head, re.IGNORECASE)
                body = await reader.readexactly(int(length[1])) if length else b""
                if head.startswith("GET"):
                    answered = sum(kind in ("answered", *LASTING) for _, _, kind in self.log)
                    content = {"answered": answered, "faults": self.counts(), "log": self.log}
                    writer.write(_response(200, json.dumps(content).encode()))
                elif not await self.question(body, writer):
                    break
                await writer.drain()
        writer.close()

    def counts(self) -> dict[str, int]:
        kinds = [kind for _, _, kind in self.log if kind != "answered"]
        return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}

    async def question(self, body: bytes, writer: asyncio.StreamWriter) -> bool:
        asked = json.loads(body)["messages"]
        key = hashlib.sha256(body).hexdigest()[:16]
        self.attempts[key] = self.attempts.get(key, 0) + 1
        fault = self.fault(key)
        named = re.search(r"f\d+x", asked[-1]["content"])
        self.log.append((named[0] if named else "", key, fault or "answered"))
        if self.delay:
            await asyncio.sleep(self.delay)
        if fault == "silence":
            await asyncio.sleep(3600)
        if fault == "closed":
            return False
        if fault in ("429", "500"):
            error = json.dumps({"error": {"message": "not now", "type": "busy"}}).encode()
            writer.write(_response(int(fault), error, "Retry-After: 0.01\r\n"))
            return True
        text = {"refusal": "I'm sorry, I can't help with that.", "nonsense": "[1, 0, maybe"}.get(fault or "")
        message = {"role": "assistant", "content": text if text is not None else _answer(asked)}
        content = json.dumps(
            {
                "id": key,
                "object": "chat.completion",
                "created": 0,
                "model": "mock",
                "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                "usage": {
                    "prompt_tokens": len(body) // 4,
                    "completion_tokens": 12,
                    "total_tokens": len(body) // 4 + 12,
                },
            }
        ).encode()
        writer.write(_response(200, content[: len(content) // 2] if fault == "cut off" else content))
        return True

    def fault(self, key: str) -> str | None:
        place = int(key, 16) / 16 ** len(key)
        for kind, share in self.faults.items():
            if place < share:
                return kind if kind in LASTING or self.attempts[key] == 1 else None
            place -= share
        return None


def _answer(asked: list[dict[str, str]]) -> str:
    """An explanation, or a verdict for each fragment: whether it holds the feature's own word."""
    question = asked[-1]["content"]
    word = re.search(r"f\d+x", question)
    if not question.startswith("Description:"):
        return f"[EXPLANATION]: texts with the word {word[0] if word else 'nothing'}"
    described, _, fragments = question.partition("\n\n")
    named = re.search(r"f\d+x", described)
    lines = [line for line in fragments.splitlines() if line.startswith("Fragment")]
    return str([int(named is not None and named[0] in line) for line in lines])


def _response(status: int, body: bytes, more: str = "") -> bytes:
    head = f"HTTP/1.1 {status} OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{more}\r\n"
    return head.encode() + body
