"""/v1/completions and /v1/chat/completions through to a real server, over TCP both ways."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.responses import StreamingResponse as Streaming

from tests.generation_server import (
    DONE,
    PATIENCE,
    GenerationServer,
    Moment,
    cut_off,
    event,
    generate,
    generation_server,
    list_models,
    listener,
    vecmill_before,
)
from tests.servers import free_port, start, vecmill_command
from tests.tiny_checkpoints import tiny_bert
from vecmill.config import load_settings
from vecmill.core.errors import StartupError

SSE = "text/event-stream"
PATHS = ["/v1/completions", "/v1/chat/completions"]
MESSAGES: list[Any] = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def shared_upstream() -> Iterator[GenerationServer]:
    with generation_server() as server:
        yield server


@pytest.fixture
def upstream(shared_upstream: GenerationServer) -> GenerationServer:
    """The generation server, as it answers by default."""
    shared_upstream.generate, shared_upstream.list_models = generate, list_models
    shared_upstream.headers.clear()
    shared_upstream.paths.clear()
    return shared_upstream


@pytest.fixture(scope="module")
def url(shared_upstream: GenerationServer) -> Iterator[str]:
    with vecmill_before(f"{shared_upstream.url}/v1/", generation_api_key="upstream-key") as url:
        yield url


@pytest.fixture
async def http(url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:
        yield client


@pytest.fixture
async def sdk(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="client-key", max_retries=0) as client:
        yield client


async def ask(url: str, **body: object) -> httpx.Response:
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:
        return await client.post("/v1/completions", json={"model": "m", "prompt": "p", **body})


async def test_the_openai_client_completes(upstream: GenerationServer, sdk: openai.AsyncOpenAI) -> None:
    whole = await sdk.completions.create(model="qwen/chat", prompt="hello")
    assert (whole.model, whole.choices[0].text) == ("qwen/chat", "once")
    parts = [part.choices[0].text async for part in await sdk.completions.create(model="m", prompt="p", stream=True)]
    assert parts == ["on", "ce"]
    assert upstream.paths == ["/v1/completions"] * 2


async def test_the_openai_client_chats(upstream: GenerationServer, sdk: openai.AsyncOpenAI) -> None:
    whole = await sdk.chat.completions.create(model="qwen/chat", messages=MESSAGES)
    assert whole.choices[0].message.content == "once"
    stream = await sdk.chat.completions.create(model="m", messages=MESSAGES, stream=True)
    assert [part.choices[0].delta.content async for part in stream] == ["on", "ce"]
    assert upstream.paths == ["/v1/chat/completions"] * 2


async def test_an_event_arrives_before_the_next_is_sent(upstream: GenerationServer, sdk: openai.AsyncOpenAI) -> None:
    confirmed = Moment()

    async def events() -> AsyncIterator[bytes]:
        yield event("first")
        await confirmed.wait()
        yield event("second") + DONE

    async def stepwise(request: Request) -> Response:
        return Streaming(events(), media_type=SSE)

    upstream.generate = stepwise
    texts = []
    async for part in await sdk.completions.create(model="m", prompt="p", stream=True):
        texts.append(part.choices[0].text)
        confirmed.happen()
    assert texts == ["first", "second"]


@pytest.mark.parametrize("declared", [True, False])
async def test_a_body_goes_up_as_it_arrives(
    upstream: GenerationServer, http: httpx.AsyncClient, declared: bool
) -> None:
    seen = Moment()
    body = json.dumps({"model": "m", "prompt": "p" * 100}).encode()

    async def halves() -> AsyncIterator[bytes]:
        yield body[:50]
        await seen.wait()
        yield body[50:]

    async def read(request: Request) -> Response:
        received = b""
        async for chunk in request.stream():
            received += chunk
            seen.happen()
        return PlainTextResponse(received)

    upstream.generate = read
    headers = {"Content-Length": str(len(body))} if declared else {}
    answer = await http.post("/v1/completions", content=halves(), headers=headers)
    assert (answer.status_code, answer.content) == (200, body)
    assert upstream.headers[0].get("content-length") == (str(len(body)) if declared else None)


async def test_a_client_that_leaves_a_stream_ends_it(upstream: GenerationServer, url: str) -> None:
    left = Moment()

    async def endless() -> AsyncIterator[bytes]:
        try:
            yield event("first")
            await asyncio.Event().wait()
        finally:
            left.happen()

    async def hang(request: Request) -> Response:
        return Streaming(endless(), media_type=SSE)

    upstream.generate = hang
    reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(url).port)
    try:
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}")
        await writer.drain()
        await reader.readuntil(b"first")
    finally:
        writer.close()
        await writer.wait_closed()
    await left.wait()


@pytest.mark.parametrize("sent", [b"", b"abc", b"abcdef"])
async def test_a_client_that_leaves_before_the_answer_ends_the_request(
    upstream: GenerationServer, url: str, sent: bytes
) -> None:
    """While the generation server waits for the body, for the rest of it, and while it thinks."""
    forwarded, left = Moment(), Moment()

    async def think(request: Request) -> Response:
        received = b""
        forwarded.happen() if not sent else None
        try:
            async for chunk in request.stream():
                received += chunk
                forwarded.happen() if received == sent else None
            while (await request.receive())["type"] != "http.disconnect":
                pass
        except ClientDisconnect:
            pass
        left.happen()
        return Response()

    upstream.generate = think
    _, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(url).port)
    try:
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 6\r\n\r\n" + sent)
        await writer.drain()
        await forwarded.wait()
    finally:
        writer.close()
        await writer.wait_closed()
    await left.wait()


async def test_only_what_belongs_to_the_call_is_passed_on(upstream: GenerationServer, http: httpx.AsyncClient) -> None:
    async def with_cookie(request: Request) -> Response:
        answer = await generate(request)
        answer.headers.update({"Set-Cookie": "a=b", "Server": "upstream", "Keep-Alive": "timeout=5", "X-Inside": "1"})
        return answer

    upstream.generate = with_cookie
    theirs = {
        "Authorization": "Bearer client-key",
        "api-key": "client-key",
        "X-Api-Key": "client-key",
        "Cookie": "session=client-key",
        "X-Forwarded-For": "10.0.0.1",
        "Connection": "keep-alive, X-Hop",
        "X-Hop": "1",
        "Accept": "application/json",
        "Accept-Encoding": "gzip",
        "X-Request-ID": "request-4711",
    }
    await http.post("/v1/completions", json={"model": "m"}, headers=theirs)
    answer = await http.post("/v1/completions?key=client-key", json={"model": "m"}, headers=theirs)
    sent = upstream.headers[1]
    assert "client-key" not in str(upstream.headers)
    assert sent["authorization"] == "Bearer upstream-key"
    assert sent["x-request-id"] == answer.headers["x-request-id"] == "request-4711"
    assert (sent["accept"], sent["content-type"]) == ("application/json", "application/json")
    assert set(sent) == {
        *("host", "accept", "accept-encoding", "connection", "user-agent", "authorization"),
        *("content-type", "content-length", "x-request-id", "via"),
    }
    assert sent["accept-encoding"] == "identity"
    assert {"set-cookie", "keep-alive", "x-inside"}.isdisjoint(answer.headers)
    assert answer.headers.get("server") != "upstream"


async def test_json_errors_come_back_as_they_are(upstream: GenerationServer, sdk: openai.AsyncOpenAI) -> None:
    body = {"error": {"message": "slow down", "type": "rate", "param": None, "code": 429, "extra": 1}}

    async def refuse(request: Request) -> Response:
        return JSONResponse(body, 429, {"Retry-After": "7"})

    upstream.generate = refuse
    with pytest.raises(openai.RateLimitError) as refused:
        await sdk.completions.create(model="m", prompt="p", stream=True)
    assert refused.value.response.json() == body
    assert refused.value.response.headers["retry-after"] == "7"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (HTMLResponse("<html>nginx</html>", 500), "answered 500"),
        (PlainTextResponse("404 page not found\n", 404), "answered 404 Not Found: 404 page not found"),
        (Response(b"busy", 503, {"Retry-After": "3"}), "answered 503"),
        (JSONResponse("only a string", 400), "answered 400"),
    ],
)
async def test_other_errors_get_openais_shape(
    upstream: GenerationServer, http: httpx.AsyncClient, answer: Response, message: str
) -> None:
    async def refuse(request: Request) -> Response:
        return answer

    upstream.generate = refuse
    refused = await http.post("/v1/chat/completions", json={"model": "m"})
    assert refused.status_code == answer.status_code
    assert refused.headers["content-type"] == "application/json"
    assert refused.headers.get("retry-after") == answer.headers.get("retry-after")
    error = refused.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert message in error["message"]
    assert "GENERATION_URL" in error["message"]
    assert "nginx" not in refused.text


async def test_an_error_without_end_is_cut_and_its_connection_given_back(upstream: GenerationServer) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"<html>" * 10_000
            await asyncio.sleep(0)  # a client that has left is noticed by the loop alone

    async def refuse(request: Request) -> Response:
        return Streaming(endless(), 503, media_type="text/html")

    with vecmill_before(upstream.url, max_concurrent_requests=1) as url:
        upstream.generate = refuse
        refused = await ask(url)
        assert (refused.status_code, "answered 503" in refused.text) == (503, True)
        upstream.generate = generate
        assert (await ask(url)).status_code == 200


async def test_a_redirect_is_not_followed(upstream: GenerationServer, http: httpx.AsyncClient) -> None:
    async def redirect(request: Request) -> Response:
        return RedirectResponse("/elsewhere", 307)

    upstream.generate = redirect
    refused = await http.post("/v1/completions", json={"model": "m"})
    assert (refused.status_code, refused.headers.get("location")) == (502, None)
    assert "redirects" in refused.json()["error"]["message"]
    assert upstream.paths == ["/v1/completions"]


async def test_a_stream_that_dies_between_events_ends_with_an_error(
    upstream: GenerationServer, sdk: openai.AsyncOpenAI
) -> None:
    async def die(request: Request) -> Any:
        return cut_off(SSE, event("first"))

    upstream.generate = die
    stream = await sdk.completions.create(model="m", prompt="p", stream=True)
    assert (await anext(stream)).choices[0].text == "first"
    with pytest.raises(openai.APIError, match="GENERATION_URL") as died:
        await anext(stream)
    assert isinstance(died.value.body, dict)
    assert died.value.body["type"] == "server_error"


@pytest.mark.parametrize(("content_type", "begun"), [(SSE, event("first")[:20]), ("application/json", b'{"id":')])
async def test_an_answer_that_dies_midway_does_not_look_whole(
    upstream: GenerationServer, http: httpx.AsyncClient, content_type: str, begun: bytes
) -> None:
    async def die(request: Request) -> Any:
        return cut_off(content_type, begun)

    upstream.generate = die
    async with http.stream("POST", "/v1/completions", json={"model": "m"}) as answer:
        chunks = answer.aiter_raw()
        assert await anext(chunks) == begun
        with pytest.raises(httpx.RemoteProtocolError):
            await anext(chunks)


async def test_silence_is_a_timeout(upstream: GenerationServer) -> None:
    left = Moment()

    async def think(request: Request) -> Response:
        await request.body()
        while (await request.receive())["type"] != "http.disconnect":
            pass
        left.happen()
        return Response()

    async def stall(request: Request) -> Response:
        async def events() -> AsyncIterator[bytes]:
            yield event("first")
            await asyncio.Event().wait()

        return Streaming(events(), media_type=SSE)

    with vecmill_before(upstream.url, generation_timeout=0.3) as url:
        upstream.generate = think
        refused = await ask(url)
        await left.wait()
        assert (refused.status_code, refused.headers["x-should-retry"]) == (504, "false")
        assert refused.json()["error"]["code"] == "timeout"
        assert "GENERATION_TIMEOUT" in refused.json()["error"]["message"]
        upstream.generate = stall
        stalled = await ask(url, stream=True)
        events = [json.loads(line.removeprefix("data: ")) for line in stalled.text.split("\n\n") if line]
        assert events[0]["choices"][0]["text"] == "first"
        assert events[1]["error"]["code"] == "timeout"


async def test_nobody_there_is_a_502_and_changes_nothing_else() -> None:
    address = f"http://127.0.0.1:{free_port()}"
    with vecmill_before(address, generation_api_key="upstream-key") as url:
        refused = await ask(url)
        assert refused.status_code == 502
        assert int(refused.headers["retry-after"]) > 0
        assert refused.headers["x-should-retry"] == "true"
        error = refused.json()["error"]
        assert error["type"] == "server_error"
        assert f"{address} (GENERATION_URL) cannot be reached" in error["message"]
        assert "upstream-key" not in refused.text
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:
            assert (await client.get("/v1/models")).json()["data"] == []
            state = (await client.get("/health")).json()["generation"]
        assert (state["url"], state["ok"]) == (address, False)
        assert "cannot be reached" in state["message"]


async def test_a_proxy_for_the_rest_of_the_machine_is_not_used(
    upstream: GenerationServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    with vecmill_before(upstream.url) as url:
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, trust_env=False) as client:
            assert (await client.post("/v1/completions", json={"model": "m"})).status_code == 200


async def test_the_limits_on_bodies_and_requests_hold(upstream: GenerationServer) -> None:
    forwarded, done = Moment(), Moment()

    async def wait(request: Request) -> Response:
        forwarded.happen()
        await done.wait()
        return await generate(request)

    async def large() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b" " * 500

    with vecmill_before(upstream.url, max_body_bytes=1024, max_concurrent_requests=1) as url:
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:
            refused = await client.post("/v1/completions", content=large())
            assert (refused.status_code, refused.json()["error"]["code"]) == (413, "request_too_large")
        upstream.generate = wait
        first = asyncio.create_task(ask(url))
        await forwarded.wait()
        second = await ask(url)
        assert (second.status_code, second.json()["error"]["code"]) == (503, "rate_limit_exceeded")
        assert int(second.headers["retry-after"]) > 0
        done.happen()
        assert (await first).status_code == 200


async def test_a_keys_limit_on_requests_counts_those_that_are_passed_through(upstream: GenerationServer) -> None:
    forwarded, done = Moment(), Moment()

    async def wait(request: Request) -> Response:
        forwarded.happen()
        await done.wait()
        return await generate(request)

    keys = {name: f"{name}-key-of-enough-characters" for name in ("ann", "ben")}
    with vecmill_before(upstream.url, api_key=f"ann:{keys['ann']} requests=1,ben:{keys['ben']}") as url:

        async def post(name: str, path: str, **body: object) -> httpx.Response:
            async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:
                return await client.post(path, json=body, headers={"Authorization": f"Bearer {keys[name]}"})

        upstream.generate = wait
        first = asyncio.create_task(post("ann", "/v1/completions", model="m", prompt="p"))
        await forwarded.wait()
        second = await post("ann", "/v1/completions", model="m", prompt="p")
        assert (second.status_code, second.json()["error"]["code"]) == (503, "rate_limit_exceeded")
        assert "limit (`requests`)" in second.json()["error"]["message"]
        upstream.generate = generate
        assert (await post("ben", "/v1/completions", model="m", prompt="p")).status_code == 200
        done.happen()
        assert (await first).status_code == 200
        assert (await post("ann", "/v1/completions", model="m", prompt="p")).status_code == 200


async def test_sigterm_ends_streams_in_time_and_no_secret_is_in_the_log(
    upstream: GenerationServer, tmp_path: Path, minilm_folder: Path
) -> None:
    left, log, port = Moment(), tmp_path / "log", free_port()

    async def endless() -> AsyncIterator[bytes]:
        try:
            yield event("secret answer")
            await asyncio.Event().wait()
        finally:
            left.happen()

    async def hang(request: Request) -> Response:
        return Streaming(endless(), media_type=SSE)

    async def die(request: Request) -> Any:
        return cut_off(SSE, b"data: secret")

    options = ("--generation-url", upstream.url, "--shutdown-seconds", "1", "--log-level", "debug")
    command = vecmill_command(port, *options, "--embed-model", str(tiny_bert(tmp_path / "tiny", minilm_folder)))
    environment = {**os.environ, "GENERATION_API_KEY": "secret-upstream-key", "STATE_DIR": str(tmp_path / "state")}
    with log.open("wb") as file:
        process = start(command, stdout=file, env=environment)
        try:
            client = httpx.AsyncClient(
                base_url=f"http://127.0.0.1:{port}",
                headers={"Authorization": "Bearer secret-client-key"},
                transport=httpx.AsyncHTTPTransport(retries=20),
                timeout=PATIENCE,
            )
            async with client:
                while (await client.get("/ready")).status_code != 200:
                    assert process.poll() is None, log.read_text()
                body = {"model": "m", "prompt": "a secret prompt", "stream": True}
                for answer in (generate, die):
                    upstream.generate = answer
                    with suppress(httpx.RemoteProtocolError):
                        await client.post("/v1/completions?secret", json=body)
                upstream.generate = hang
                async with client.stream("POST", "/v1/completions", json=body) as stream:
                    chunks = stream.aiter_raw()
                    assert await anext(chunks) == event("secret answer")
                    process.send_signal(signal.SIGTERM)
                    with pytest.raises(httpx.TransportError):
                        await anext(chunks)
                await left.wait()
            assert await asyncio.to_thread(process.wait, PATIENCE) == 0
        finally:
            process.kill()
    assert upstream.headers[0]["authorization"] == "Bearer secret-upstream-key"
    assert "the generation server gave no answer" in log.read_text("utf-8")
    assert "secret" not in log.read_text("utf-8")


async def test_an_address_that_leads_back_here_is_found_out() -> None:
    here = listener()
    with vecmill_before(f"http://127.0.0.1:{here.getsockname()[1]}", on=here) as url:
        refused = await ask(url)
    assert refused.status_code == 502
    assert "leads back" in refused.json()["error"]["message"]


@pytest.mark.parametrize("path", PATHS)
async def test_without_an_address_a_404_says_what_to_set(client: httpx.AsyncClient, path: str) -> None:
    refused = await client.post(path, json={"model": "m"})
    assert refused.status_code == 404
    error = refused.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "embeds and reranks" in error["message"]
    assert "GENERATION_URL" in error["message"]
    assert path in error["message"]
    assert (await client.get("/health")).json()["generation"] is None


async def test_its_models_stand_after_ours(upstream: GenerationServer, tmp_path: Path, minilm_folder: Path) -> None:
    folder = tiny_bert(tmp_path / "small", minilm_folder)  # the generation server has a `small` too
    with vecmill_before(upstream.url, embed_model=str(folder)) as url:
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:
            async with asyncio.timeout(PATIENCE):
                while (health := await client.get("/health")).status_code != 200:
                    await asyncio.sleep(0.01)
            assert health.json()["generation"] == {"url": upstream.url, "ok": True, "message": "ok"}
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as sdk:
            models = (await sdk.models.list()).data
            assert [(model.id, model.owned_by) for model in models] == [("small", "vecmill"), ("qwen/chat", "vllm")]
            assert models[1].model_dump()["max_model_len"] == 8192
            assert (await sdk.models.retrieve("qwen/chat")).owned_by == "vllm"
            assert (await sdk.models.retrieve("small")).owned_by == "vecmill"
            with pytest.raises(openai.NotFoundError):
                await sdk.models.retrieve("neither")


@pytest.mark.parametrize(
    ("answer", "ok", "message"),
    [
        (JSONResponse({"object": "list", "data": None}), True, "ok"),  # Ollama without models
        (JSONResponse({"error": "who are you"}, 401), False, "GENERATION_API_KEY"),
        (HTMLResponse("<html>"), False, "no list of models"),
        (JSONResponse(["x"]), False, "no list of models"),
        (HTMLResponse("<html>", 500), False, "answers 500"),
    ],
)
async def test_health_says_how_the_generation_server_is(
    upstream: GenerationServer, answer: Response, ok: bool, message: str
) -> None:
    async def listed(request: Request) -> Response:
        return answer

    upstream.list_models = listed
    with vecmill_before(upstream.url) as url:
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:
            assert (await client.get("/v1/models")).json()["data"] == []
            state = (await client.get("/health")).json()["generation"]
    assert state["ok"] is ok
    assert message in state["message"]


async def test_a_server_that_hangs_delays_nobody_for_long(upstream: GenerationServer) -> None:
    done = Moment()

    async def hang(request: Request) -> Response:
        await done.wait()
        return await list_models(request)

    upstream.list_models = hang
    with vecmill_before(upstream.url) as url:
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:
            early = await client.get("/health")
            assert early.elapsed.total_seconds() < 5
            assert early.json()["generation"]["message"] == "not asked yet"
            listed = await client.get("/v1/models")
            assert listed.json()["data"] == []
            assert listed.elapsed.total_seconds() < 5
            assert (await client.get("/health")).json()["generation"]["message"] == "no answer within 2 s"
    done.happen()


@pytest.mark.parametrize("given", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_the_address_may_end_with_v1(given: str) -> None:
    assert load_settings({"generation_url": given}).generation.generation_url == "http://h:1"


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"generation_url": "127.0.0.1:8000"}, "of the form"),
        ({"generation_url": "ftp://secret-host"}, "of the form"),
        ({"generation_url": "http://"}, "of the form"),
        ({"generation_url": "http://host:secret"}, "of the form"),
        ({"generation_url": "http://ho st"}, "of the form"),
        ({"generation_url": "http://user:secret@host"}, "GENERATION_API_KEY"),
        ({"generation_url": "http://host/?key=secret"}, "no `?`"),
        ({"generation_api_key": "sec ret"}, "printable"),
        ({"generation_timeout": 0}, "greater than 0"),
    ],
)
def test_a_wrong_setting_is_one_sentence_without_secrets(flags: dict[str, object], problem: str) -> None:
    with pytest.raises(StartupError, match="GENERATION_") as refused:
        load_settings(flags)
    assert problem in refused.value.message
    assert "secret" not in refused.value.message
    assert "sec ret" not in refused.value.message
