"""The addresses of the page and what each answers.

====================  =====================================================================================
``/``                 the page
``/video``            pictures of all sources, or of those named by ``?source=``, in one connection
``/video/SOURCE``     MJPEG of one source, for whatever shows MJPEG
``/snapshot/S.jpg``   one picture
``/api/view``         `StreamView` as JSON
``/api/events``       the same twice a second, as server-sent events
``/metrics``          Prometheus
``/healthz``          200 while the runtime's loop turns, else 503
``/readyz``           200 while frames come and are answered, else 503
``POST /reload``      loads the bundle anew, or ``{"bundle": PATH}``
``POST /check``       runs the golden frames through the live path
====================  =====================================================================================

The page shows all sources through ``/video`` and not through an MJPEG stream each: a browser opens six
connections to a host, so that eight cameras would leave none for the figures beside them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from aiohttp import web

from apps.streaming.serve.access import Access
from apps.streaming.serve.asking import App, Seen
from apps.streaming.serve.clients import Clients
from apps.streaming.serve.connections import Connections
from apps.streaming.serve.exposition import PageFigures, exposition
from apps.streaming.serve.health import Verdict, health, readiness
from apps.streaming.serve.pictures import JpegPicture, LatestPictures
from pipeline.errors import EdgefoldError

__all__ = ["make_application"]

_MAX_BODY_BYTES = 16 * 1024
_EVENT_INTERVAL_S = 0.5
_SNAPSHOT_WAIT_S = 3.0
_BOUNDARY = "edgefold-frame"
_STATIC = {
    "page.html": "text/html",
    "page.css": "text/css",
    "page.js": "text/javascript",
    "video.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}


class _Pages:
    def __init__(
        self,
        app: App,
        hub: LatestPictures,
        clients: Clients,
        heartbeat_age_s: Callable[[], float],
        may_name_bundle: bool,
    ) -> None:
        self._app = app
        self._hub = hub
        self._clients = clients
        self._heartbeat_age_s = heartbeat_age_s
        self._may_name_bundle = may_name_bundle
        folder = resources.files("apps.streaming.serve") / "static"
        self._files = {name: (folder / name).read_bytes() for name in _STATIC}

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/", self.page),
            web.get("/static/{name}", self.static),
            web.get("/video", self.video, allow_head=False),
            web.get("/video/{source:.+}", self.mjpeg, allow_head=False),
            web.get("/snapshot/{source:.+}.jpg", self.snapshot),
            web.get("/api/view", self.view),
            web.get("/api/events", self.events, allow_head=False),
            web.get("/metrics", self.metrics),
            web.get("/healthz", self.healthz),
            web.get("/readyz", self.readyz),
            web.post("/reload", self.reload),
            web.post("/check", self.check),
        ]

    # --- the page -----------------------------------------------------------------------------------

    async def page(self, request: web.Request) -> web.Response:
        return self._file("page.html")

    async def static(self, request: web.Request) -> web.Response:
        return self._file(request.match_info["name"])

    def _file(self, name: str) -> web.Response:
        if name not in self._files:
            raise web.HTTPNotFound(text=f"404: there is no file {name!r}\n")
        return web.Response(
            body=self._files[name],
            content_type=_STATIC[name],
            charset="utf-8",
            headers={"Cache-Control": "no-cache"},
        )

    # --- pictures -----------------------------------------------------------------------------------

    async def video(self, request: web.Request) -> web.StreamResponse:
        known = _source_ids(await self._app.seen())
        wanted = list(dict.fromkeys(request.query.getall("source", known)))
        for name in wanted:
            _require_source(name, known)
        return await self._stream_pictures(request, wanted, "multipart/mixed")

    async def mjpeg(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["source"]
        _require_source(name, _source_ids(await self._app.seen()))
        return await self._stream_pictures(request, [name], "multipart/x-mixed-replace")

    async def _stream_pictures(
        self, request: web.Request, names: list[str], content_type: str
    ) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={"Content-Type": f"{content_type}; boundary={_BOUNDARY}", "X-Accel-Buffering": "no"}
        )
        async with self._clients.stream("video", request, response) as client:
            await client.send(f"--{_BOUNDARY}\r\n".encode())
            with self._hub.watch(names) as watch:
                while client.connected:
                    picture = await watch.next(timeout_s=1.0)
                    if picture is not None:
                        await client.send(_part(picture))
        return response

    async def snapshot(self, request: web.Request) -> web.Response:
        name = request.match_info["source"]
        _require_source(name, _source_ids(await self._app.seen()))
        with self._hub.watch([name]) as watch:
            picture = await watch.next(_SNAPSHOT_WAIT_S)
        if picture is None:
            raise web.HTTPServiceUnavailable(
                text=f"503: {name} has given no picture for {_SNAPSHOT_WAIT_S:.0f} s\n",
                headers={"Retry-After": "5"},
            )
        return web.Response(body=picture.jpeg, content_type="image/jpeg")

    # --- figures ------------------------------------------------------------------------------------

    async def view(self, request: web.Request) -> web.Response:
        return web.Response(text=(await self._app.seen()).payload, content_type="application/json")

    async def events(self, request: web.Request) -> web.StreamResponse:
        seen = await self._app.seen()
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "X-Accel-Buffering": "no"}
        )
        async with self._clients.stream("events", request, response) as client:
            while client.connected:
                await client.send(f"data: {seen.payload}\n\n".encode())
                await client.pause(_EVENT_INTERVAL_S)
                seen = await self._app.seen()
        return response

    async def metrics(self, request: web.Request) -> web.Response:
        seen = await self._app.seen()
        figures = PageFigures(
            video_clients=self._clients.count("video"),
            event_clients=self._clients.count("events"),
            refused=self._clients.n_refused,
            cut=self._clients.n_cut,
            pictures_accepted=self._hub.n_accepted,
            pictures_encoded=self._hub.n_encoded,
        )
        body, content_type = exposition(seen.view, figures, request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def healthz(self, request: web.Request) -> web.Response:
        return _verdict(health(self._heartbeat_age_s()))

    async def readyz(self, request: web.Request) -> web.Response:
        seen = await self._app.seen()
        return _verdict(readiness(seen.view, seen.taken_ns))

    # --- commands -----------------------------------------------------------------------------------

    async def reload(self, request: web.Request) -> web.Response:
        bundle = await _bundle_of(request)
        if bundle is not None and not self._may_name_bundle:
            raise web.HTTPForbidden(
                text="403: another bundle is code that will run, and every user of this machine can reach a "
                "page without a token. Start the stream with a token, or reload without naming a bundle.\n"
            )
        try:
            await self._app.reload(bundle)
        except EdgefoldError as error:
            return _refused(error)
        return web.json_response({"reloaded": True})

    async def check(self, request: web.Request) -> web.Response:
        try:
            return web.json_response({"preprocessing": await self._app.check()})
        except EdgefoldError as error:
            return _refused(error)


def make_application(
    app: App,
    hub: LatestPictures,
    clients: Clients,
    access: Access,
    connections: Connections,
    heartbeat_age_s: Callable[[], float],
) -> web.Application:
    """The web application; `heartbeat_age_s` is the time since the runtime's last sign of life."""
    application = web.Application(
        middlewares=[connections.middleware, access.middleware], client_max_size=_MAX_BODY_BYTES
    )
    application.on_response_prepare.append(access.add_headers)
    pages = _Pages(app, hub, clients, heartbeat_age_s, may_name_bundle=access.by_token)
    application.add_routes(pages.routes())
    return application


def _source_ids(seen: Seen) -> list[str]:
    return [source.status.source_id for source in seen.view.sources]


def _require_source(name: str, known: list[str]) -> None:
    if name not in known:
        raise web.HTTPNotFound(text=f"404: there is no source {name!r}; there are: {', '.join(known)}\n")


def _part(picture: JpegPicture) -> bytes:
    # The boundary after the part, not before the next: a browser shows a picture once it sees its end.
    head = (
        f"Content-Type: image/jpeg\r\nContent-Length: {len(picture.jpeg)}\r\n"
        f"X-Source: {quote(picture.source_id, safe='')}\r\n\r\n"
    )
    return b"".join((head.encode(), picture.jpeg, f"\r\n--{_BOUNDARY}\r\n".encode()))


def _verdict(verdict: Verdict) -> web.Response:
    return web.json_response(verdict.to_json(), status=200 if verdict.ok else 503)


def _refused(error: EdgefoldError) -> web.Response:
    return web.json_response({"error": type(error).__name__, "message": str(error)}, status=422)


async def _bundle_of(request: web.Request) -> Path | None:
    text = await request.text()
    if not text.strip():
        return None
    try:
        body: Any = json.loads(text)
    except ValueError as error:
        raise web.HTTPBadRequest(text=f"400: the body is not JSON: {error}\n") from error
    if not isinstance(body, dict) or set(body) != {"bundle"} or not isinstance(body["bundle"], str):
        raise web.HTTPBadRequest(text='400: the body may be empty or {"bundle": "PATH"}\n')
    return Path(body["bundle"])
