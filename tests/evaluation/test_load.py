"""The load generator against a server whose behaviour is known."""

import asyncio
import json
import re
import threading
import time

import numpy as np
import pytest

from shortlist.errors import DataError
from shortlist.evaluation.load import FAILED, Post, closed_loop, open_loop

IDLE_S = 3.0


@pytest.fixture(scope="module")
def port():
    """A server that answers /wait/MS after so many milliseconds, /status/N with that status, and closes at /broken.

    What it says is the path and the body it got. An idle connection it closes after `IDLE_S`, without a word, as servers do.
    """
    started, ports = threading.Event(), []

    async def handle(reader, writer):
        try:
            while True:
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), IDLE_S)
                path = head.split()[1].decode()
                told = re.search(rb"content-length: (\d+)", head.lower())
                got = "" if told is None else (await reader.readexactly(int(told[1]))).decode()
                _, kind, *value = path.split("/")
                status, body = 200, json.dumps({"path": path, "body": got}).encode()
                if kind == "wait":
                    await asyncio.sleep(float(value[0]) / 1e3)
                elif kind == "status":
                    status = int(value[0])
                elif kind == "broken":
                    break
                close = b"connection: close\r\n" if kind == "once" else b""
                writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n%s\r\n%s" % (status, len(body), close, body))
                if close:
                    break
        except (asyncio.IncompleteReadError, TimeoutError):
            pass
        finally:
            writer.close()

    async def serve():
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        ports.append(server.sockets[0].getsockname()[1])
        started.set()
        await server.serve_forever()

    threading.Thread(target=lambda: asyncio.run(serve()), daemon=True).start()
    assert started.wait(5)
    return ports[0]


def test_every_request_gets_its_own_reply(port):
    paths = [f"/path/{n}" for n in range(50)] + ["/status/503", "/broken", "/once", "/path/last"]
    replies = closed_loop(port, paths, concurrency=4)
    assert replies.status.tolist() == [200] * 50 + [503, FAILED, 200, 200]
    bodies = [None if body is None else json.loads(body)["path"] for body in replies.bodies]
    assert bodies == [*paths[:51], None, *paths[52:]]


def test_a_request_may_bring_a_body(port):
    asks = [Post("/path/a", b'{"user": "\xc3\xa9"}'), "/path/b", Post("/status/422", b"[]")]
    replies = closed_loop(port, asks, concurrency=1)
    assert replies.status.tolist() == [200, 200, 422]
    told = [json.loads(body) for body in replies.bodies]
    assert [(one["path"], one["body"]) for one in told] == [
        ("/path/a", '{"user": "\u00e9"}'),
        ("/path/b", ""),
        ("/status/422", "[]"),
    ]


def test_a_connection_that_lay_idle_is_not_used_again(port):
    replies = open_loop(port, np.array([0.0, 0.0, IDLE_S + 0.3]), ["/path/a", "/path/b", "/path/c"])
    assert replies.status.tolist() == [200, 200, 200]


def test_a_closed_loop_keeps_so_many_at_work(port):
    began = time.perf_counter()
    replies = closed_loop(port, ["/wait/50"] * 12, concurrency=4)
    seconds = time.perf_counter() - began
    assert 0.15 <= seconds < 0.6  # three rounds of four, not twelve nor one
    assert (replies.latency_ms >= 50).all()


def test_an_open_loop_waits_for_nobody(port):
    arrivals = np.arange(10) * 0.02
    replies = open_loop(port, arrivals, ["/wait/200"] * 10)
    np.testing.assert_array_equal(replies.due_s, arrivals)
    assert (replies.sent_s >= arrivals).all()
    assert np.median(replies.sent_s - arrivals) < 0.05  # although each answer takes as long as ten arrivals
    assert (replies.latency_ms >= 200).all()


def test_latency_counts_from_when_a_request_was_due(port):
    replies = open_loop(port, np.zeros(3), ["/wait/60"] * 3, max_connections=1)
    assert replies.latency_ms[2] >= 180
    assert replies.percentile(100) == replies.latency_ms.max()


def test_who_gets_no_answer_in_time_has_failed(port):
    replies = open_loop(port, np.zeros(2), ["/wait/500", "/wait/1"], timeout_s=0.15)
    assert replies.status.tolist() == [FAILED, 200]
    assert 140 <= replies.latency_ms[0] < 450


def test_nobody_listening_is_a_failure_not_a_crash():
    replies = open_loop(1, np.zeros(2), ["/", "/"], timeout_s=0.5)
    assert replies.status.tolist() == [FAILED, FAILED]
    assert np.isnan(replies.percentile(50))


def test_arrivals_and_paths_must_go_together(port):
    with pytest.raises(DataError, match="2 rising arrivals"):
        open_loop(port, np.array([0.0, 1.0]), ["/"])
    with pytest.raises(DataError, match="rising"):
        open_loop(port, np.array([1.0, 0.0]), ["/", "/"])
