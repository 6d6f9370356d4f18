"""The HTTP side of the server: routes, status codes, metrics. Needs FastAPI and prometheus-client."""

from __future__ import annotations

import asyncio
import base64
import hmac
import io
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from PIL import Image, PngImagePlugin
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.requests import ClientDisconnect

from repa_scale.errors import UserError
from repa_scale.serving.asked import Asked, Defaults, Limits, NotJson, parse
from repa_scale.serving.batcher import Batcher, Closing, Draw, Job, QueueFull, Wish
from repa_scale.serving.faults import LOST, NotDrawn
from repa_scale.serving.labels import LabelNames

LARGEST_BODY = 1 << 16  # bytes
BODY_SECONDS = 10.0  # for a client to send it
SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
POLICY = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Service:
    """What is served, and within which bounds.

    Attributes:
        draw: makes the images of a batch.
        described: of the model, for /v1/model: name, step, image_size, ...
        timeout: seconds from a request's arrival to its answer.
        token: what clients must show; empty: nothing.
    """

    draw: Draw
    labels: LabelNames
    defaults: Defaults
    limits: Limits
    described: dict[str, Any] = field(default_factory=dict)
    max_batch: int = 8
    max_queue: int = 64
    linger: float = 0.005
    timeout: float = 300.0
    token: str = ""


class Refused(Exception):
    """A request that gets no image: the status, and why."""

    def __init__(self, status: int, why: str, **headers: str) -> None:
        super().__init__(why)
        self.status, self.headers = status, headers


class Meters:
    """The figures of /metrics."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        one = {"registry": self.registry}
        self.requests = Counter("repa_scale_requests", "answers of /v1/images by status", ["status"], **one)
        self.images = Counter("repa_scale_images", "images drawn", **one)
        self.seconds = Histogram("repa_scale_request_seconds", "from request to answer", buckets=SECONDS, **one)
        self.batch_seconds = Histogram("repa_scale_batch_seconds", "drawing one batch", buckets=SECONDS, **one)
        self.batch_images = Histogram(
            "repa_scale_batch_images", "images a batch", buckets=(1, 2, 4, 8, 16, 32, 64), **one
        )
        self.waiting = Gauge("repa_scale_queue_images", "images that wait", **one)

    def batch(self, jobs: Sequence[Job], seconds: float) -> None:
        self.images.inc(sum(job.image.exception() is None for job in jobs))
        self.batch_seconds.observe(seconds)
        self.batch_images.observe(len(jobs))


def create_app(service: Service, on_lost: Callable[[], None] = lambda: None) -> FastAPI:
    """The application; its batcher starts with it and finishes what was accepted when it stops.

    Args:
        on_lost: called from another thread when nothing can be drawn any more; has to end the server.
    """
    meters = Meters()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.batcher = Batcher(
            service.draw, service.max_batch, service.max_queue, service.linger, meters.batch, on_lost
        )
        meters.waiting.set_function(lambda: app.state.batcher.waiting)
        yield
        await asyncio.to_thread(app.state.batcher.close)

    app = FastAPI(title="repa_scale", docs_url=None, redoc_url=None, lifespan=lifespan)

    @app.get("/", include_in_schema=False)
    def page() -> HTMLResponse:
        text = files("repa_scale.serving").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": POLICY})

    @app.get("/health")
    def health() -> JSONResponse:
        batcher: Batcher = app.state.batcher
        alive = batcher.alive
        state = "ok" if alive else LOST if batcher.lost else "the drawing thread has ended"
        return JSONResponse({"status": state, "waiting": batcher.waiting}, 200 if alive else 503)

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(meters.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/model")
    def model(request: Request) -> Response:
        if refused := _unknown_client(request, service.token):
            return refused
        return JSONResponse(
            {
                **service.described,
                "classes": list(service.labels.names),
                "defaults": vars(service.defaults),
                "limits": vars(service.limits),
            }
        )

    @app.post("/v1/images", openapi_extra=_schema(service))
    async def images(request: Request) -> Response:
        began = time.monotonic()
        answer = _unknown_client(request, service.token)
        if answer is None:
            try:
                answer = await _answer(request, service, app.state.batcher)
            except Refused as refused:
                answer = _error(refused.status, str(refused), refused.headers)
        meters.requests.labels(answer.status_code).inc()
        meters.seconds.observe(time.monotonic() - began)
        return answer

    return app


async def _answer(request: Request, service: Service, batcher: Batcher) -> Response:
    body = await _body(request)
    try:
        asked = parse(body, service.labels, service.defaults, service.limits)
    except UserError as error:
        raise Refused(400 if isinstance(error, NotJson) else 422, str(error)) from None
    try:
        jobs = batcher.submit(asked.wishes)
    except QueueFull:
        why = f"the queue of {service.max_queue} images has no room for {len(asked.wishes)}; try again later"
        raise Refused(429, why, **{"Retry-After": "1"}) from None
    except Closing:
        raise Refused(503, "the server is stopping; ask another one") from None
    began = time.monotonic()
    drawn = await _wait(request, batcher, jobs, service.timeout)
    return await asyncio.to_thread(_picture, asked, drawn, service.labels, time.monotonic() - began)


async def _wait(request: Request, batcher: Batcher, jobs: list[Job], timeout: float) -> list[np.ndarray]:
    """The images of all jobs; or they are abandoned because the time is over or the client is gone."""
    everything = asyncio.gather(*(asyncio.wrap_future(job.image) for job in jobs), return_exceptions=True)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({everything, gone}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if not everything.done():
            batcher.abandon(jobs)
            if gone.done():
                raise Refused(499, "the client is gone")
            raise Refused(504, f"not drawn within {timeout:g} s; ask for fewer steps or images, or try again later")
    finally:
        gone.cancel()
        everything.cancel()
    results = everything.result()
    if failed := [each for each in results if isinstance(each, BaseException)]:
        first = failed[0]
        if not isinstance(first, NotDrawn):
            raise Refused(500, f"drawing failed ({type(first).__name__}); the server's log says why")
        raise Refused(first.status, str(first), **({"Retry-After": "1"} if first.status == 503 else {}))
    return results


async def _gone(receive: Callable[[], Awaitable[dict]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request) -> bytes:
    too_large = Refused(413, f"the body is larger than {LARGEST_BODY} bytes")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > LARGEST_BODY:
        raise too_large

    async def read() -> bytes:
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > LARGEST_BODY:
                raise too_large
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise Refused(408, f"the body did not come within {BODY_SECONDS:g} s") from None
    except ClientDisconnect:
        raise Refused(499, "the client is gone") from None


def _picture(asked: Asked, drawn: list[np.ndarray], labels: LabelNames, seconds: float) -> Response:
    pictures = [_png(wish, image, labels) for wish, image in zip(asked.wishes, drawn, strict=True)]
    first = asked.wishes[0]
    if asked.format == "png":
        return Response(
            pictures[0], media_type="image/png", headers={"X-Seed": str(first.seed), "X-Class": str(first.label)}
        )
    listed = [
        {"png": base64.b64encode(png).decode(), "class": wish.label, "name": _name(wish, labels), "seed": wish.seed}
        for wish, png in zip(asked.wishes, pictures, strict=True)
    ]
    said = {key: getattr(first, key) for key in ("steps", "sampler", "guidance", "interval")}
    return JSONResponse({"images": listed, **said, "seconds": round(seconds, 4)})


def _png(wish: Wish, image: np.ndarray, labels: LabelNames) -> bytes:
    """The image as PNG; how it was asked for stands in its text chunk `repa_scale`."""
    said = PngImagePlugin.PngInfo()
    said.add_text("repa_scale", json.dumps({**vars(wish), "name": _name(wish, labels)}))
    buffer = io.BytesIO()
    # The fastest level: a third of the usual one's time on smooth images, for a sixth more bytes.
    Image.fromarray(image).save(buffer, format="PNG", pnginfo=said, compress_level=1)
    return buffer.getvalue()


def _name(wish: Wish, labels: LabelNames) -> str | None:
    return labels.names[wish.label] if wish.label < labels.null else None


def _unknown_client(request: Request, token: str) -> Response | None:
    shown = request.headers.get("authorization", "")
    if not token or hmac.compare_digest(shown.encode(), f"Bearer {token}".encode()):
        return None
    return _error(401, "this server wants the header `Authorization: Bearer TOKEN`", {"WWW-Authenticate": "Bearer"})


def _error(status: int, why: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": why}, status, headers)


def _schema(service: Service) -> dict[str, Any]:
    """The body of POST /v1/images, for /openapi.json; asked.py is what checks it."""
    whole = {"type": "integer", "minimum": 1}
    properties = {
        "class": {"oneOf": [{"type": "integer"}, {"type": "string"}, {"type": "null"}]},
        "seed": {"type": "integer", "minimum": 0},
        "n": {**whole, "maximum": service.limits.n},
        "steps": {**whole, "maximum": service.limits.steps},
        "guidance": {"type": "number", "minimum": 0},
        "interval": {
            "type": "array",
            "items": {"type": "number", "minimum": 0, "maximum": 1},
            "minItems": 2,
            "maxItems": 2,
        },
        "sampler": {"type": "string"},
        "format": {"type": "string", "enum": ["png", "json"]},
    }
    content = {
        "application/json": {"schema": {"type": "object", "properties": properties, "additionalProperties": False}}
    }
    return {"requestBody": {"content": content}}
