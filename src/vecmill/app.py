"""The composition root: knows every class, decides nothing."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, TypeVar

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from vecmill import __version__
from vecmill.config import Settings
from vecmill.core.calibration import RunningFit, Warmed
from vecmill.core.errors import StartupError, StartupObstacle
from vecmill.core.health import Health, Phase
from vecmill.core.threads import WorkerThreads
from vecmill.core.types import ModelCard, PassRecord, Task
from vecmill.hardware.gpu import ClockVerdict
from vecmill.hardware.memory import MemoryGuard, keep_freed_memory
from vecmill.hardware.monitor import Monitor, Watched
from vecmill.http import api_document, batches, capabilities, errors, files, health, jobs, models, stats
from vecmill.http.access import HOST_NAME, Access, ApiKeys, in_both_families
from vecmill.http.batch_lines import batch_endpoints
from vecmill.http.body_limit import Bodies, BodyLimit
from vecmill.http.dashboard import doctor, live, page, replicas
from vecmill.http.dashboard.doctor import Doctor
from vecmill.http.dashboard.live import Live
from vecmill.http.dashboard.machine import Machine
from vecmill.http.dashboard.replicas import Replicas
from vecmill.http.dashboard.sampling import Sampler
from vecmill.http.dashboard.snapshot import Snapshots
from vecmill.http.dialects import registry
from vecmill.http.generation import Generation
from vecmill.http.middleware import AcceptedGZip, Draining, InProgress, RequestLine
from vecmill.http.origins import Cors, Origins
from vecmill.http.request_log import RequestLog
from vecmill.http.services import Services
from vecmill.http.stats import watch_gauges
from vecmill.http.tracing import Tracing, open_tracing
from vecmill.inference.catalogue import Cached, Catalogue
from vecmill.inference.facade import Inference
from vecmill.inference.measuring import measure_when_quiet
from vecmill.inference.models import assemble, assemble_one
from vecmill.inference.residency import Progress, Residency
from vecmill.scheduler.policy import Budget, Rules
from vecmill.scheduler.scheduler import Scheduler
from vecmill.state import State
from vecmill.telemetry.telemetry import Telemetry

if TYPE_CHECKING:
    from vecmill.engine.engine import Engine
    from vecmill.engine.loader import Loaded

logger = logging.getLogger(__name__)

DESCRIPTION = "Embeddings and reranking from one device, for every client that asks."
LARGEST_POOL = 8
MEASUREMENTS = "measurements.json"  # in STATE_DIR
HUB = "vecmill.models.hub"  # imported when the hub's cache is looked at: its client takes a while
LOOK_AROUND_AFTER = 1.0  # seconds after the start, until the hub's cache is looked at: requests come first
T = TypeVar("T")


class Server:
    """One server's parts and its life: load, serve, drain."""

    def __init__(
        self, settings: Settings, on_failure: Callable[[str], None], on_loaded: Callable[[], None] = lambda: None
    ) -> None:
        _set_thread_defaults()
        keep_freed_memory()
        self._settings = settings
        self._on_failure = on_failure
        self._on_loaded = on_loaded
        workers = settings.inference.tokenization_workers or min(LARGEST_POOL, os.cpu_count() or 1)
        self._threads = WorkerThreads(workers)
        self._engine: Engine | None = None
        self._loaded: Loaded | None = None
        self._fits: dict[str, RunningFit] = {}
        """What forward passes take, by key of each model that has been loaded."""
        self._scheduler: Scheduler | None = None
        self._residency: Residency | None = None
        self._catalogue: Catalogue | None = None
        self._afterwards: asyncio.Task[None] | None = None
        self._has_loaded = asyncio.Event()
        """Set when a model is loaded, which may have to be measured again."""
        self.health = Health()
        self.load_ended = asyncio.Event()
        self.misconfigured = False
        """Whether it could not start for its settings, so that no restart cures it."""
        self.requests = InProgress()
        self.bodies = Bodies(settings.http.max_body_bytes, settings.http.body_timeout)
        self.keys = ApiKeys(settings.access)
        """Exchanged where API_KEY changes."""
        self.replica = settings.http.replica or f"{HOST_NAME}:{settings.http.port}"
        self.telemetry = Telemetry(self.replica, everywhere=settings.http.replica is not None)
        self._memory = MemoryGuard(settings.engine.memory_floor_gb, settings.engine.memory_fraction)
        self.inference = Inference(
            settings.inference,
            settings.scheduler.request_timeout,
            self.health,
            self.telemetry,
            self._threads,
            self._memory,
            cache_queries=settings.cache.cache_queries,
            cache_across_keys=settings.cache.cache_across_keys,
            limits_of=self.keys.limits_of,
            several_keys=lambda: self.keys.several,
            key_name=self.keys.name_of,
        )
        self.monitor = Monitor(_tell_clock)
        self.tracing: Tracing | None = None
        """None unless traces are asked for."""
        self.state = State(settings, self.telemetry)
        self.generation: Generation | None = None
        if settings.generation.generation_url is not None:
            self.generation = Generation(settings.generation, settings.inference.max_concurrent_requests)
        self.services = Services(
            settings=settings,
            health=self.health,
            inference=self.inference,
            jobs=self.state.jobs,
            batches=self.state.batches,
            replica=self.replica,
            cache=lambda: self.state.cache,
            state=lambda: self.state.folder,
            kept=self.state.problems,
            generation=self.generation,
            telemetry=self.telemetry,
            threads=self._threads,
            gpu=self.monitor.latest,
            gpu_in_use=self._uses_gpu,
            hung=self._hung,
            device_busy=lambda: self._engine.busy if self._engine else False,
            several_keys=lambda: self.keys.several,
            keys_in_use=lambda: self.keys.in_use,
            key_name=self.keys.shown_name,
            warmed=lambda: self._loaded.warmed if self._loaded else {},
            catalogue=lambda: self._catalogue,
        )
        self.telemetry.knee_of = self._knee_of
        self.machine = Machine(self.services)
        self.replicas = Replicas(self.services, self.machine, self.replica, lambda: self.state.replicas)
        self.sampler = Sampler(self.services, self.machine, self.replica)
        self.live: Live | None = None
        self.doctor = Doctor(settings)
        watch_gauges(self.services, lambda: self.requests.in_flight)

    async def open(self) -> None:
        """Make what needs the event loop and lasts until `close`."""
        self.monitor.start()
        if self.generation is not None:
            self.generation.open()
        with self._failing_start():
            # Importing OpenTelemetry takes a while.
            self.tracing = await asyncio.to_thread(open_tracing, self._settings.log.otlp_endpoint, os.environ)
            await self.state.open()
            self.replicas.start()
            if self.state.key_use is not None:
                self.inference.admission.share(self.state.key_use)
            await self.sampler.start()

    async def load(self) -> None:
        """Load the models and begin to serve; on failure record why, for good."""
        if self.health.snapshot()[0] is Phase.FAILED:
            self.load_ended.set()
            return
        try:
            with self._failing_start():
                loaded = await self._load()
                self._on_loaded()
                await self._load_others(loaded)
                self.telemetry.rolling.warmup_seconds = tuple(
                    seconds for warmed in loaded.warmed.values() for seconds in warmed.seconds
                )
                self.health.update(Phase.READY, 100, "ready")
                self._afterwards = asyncio.create_task(self._finish_start(loaded), name="after the start")
        finally:
            self.load_ended.set()

    @contextmanager
    def _failing_start(self) -> Iterator[None]:
        """Whatever keeps the server from starting is recorded. A fault's own text goes to the log alone."""
        try:
            yield
        except StartupError as error:
            self.misconfigured = not isinstance(error, StartupObstacle)
            self._fail(error.message)
        except Exception as error:
            logger.exception("the start failed")
            self._fail(f"The start failed ({type(error).__name__}); the log says why.")

    async def _load_others(self, loaded: Loaded) -> None:
        """Load what belongs to the start beside the first model, which is served meanwhile.

        Raises:
            VecmillError: one cannot be loaded.
        """
        assert self._residency is not None
        if not loaded.to_load:
            return
        if self._settings.model.ready_when == "first":
            self.health.update(Phase.READY, 100, "ready")
        loading = self._residency.complete_start(loaded.to_load)
        first, others = next(iter(loaded.models.values())).card.id, ", ".join(map(self._name_of, loaded.to_load))
        logger.info("%s answers requests now; still to be loaded: %s", first, others)
        await loading
        self._on_loaded()

    def _name_of(self, key: str) -> str:
        assert self._loaded is not None
        return self._loaded.known[key].card.id

    def _start_progress(self, key: str, progress: Progress) -> Progress:
        """Progress of a model's load, told of the server too while the start goes on."""
        assert self._loaded is not None
        if self.load_ended.is_set() or key not in self._loaded.to_load:
            return progress
        done, all_of_them = len(self._loaded.models), len({*self._loaded.models, *self._loaded.to_load})

        def tell(percent: float, message: str) -> None:
            progress(percent, message)
            self._report((100 * done + percent) / all_of_them, message)

        return tell

    async def _finish_start(self, loaded: Loaded) -> None:
        """What can wait until the first requests are answered; then measure each model in a quiet moment, for ever."""
        assert self._catalogue is not None
        await asyncio.sleep(LOOK_AROUND_AFTER)
        await self._catalogue.look_around()
        while True:
            self._has_loaded.clear()
            await measure_when_quiet(
                lambda: [key for key in loaded.models if loaded.warmed[key].is_provisional],
                lambda: self.inference.stats.batches,
                lambda: self.services.device_busy() or any(self.inference.waiting.values()),
                self._measure_again,
            )
            await self._has_loaded.wait()

    async def _measure_again(self, key: str) -> bool:
        """Measure a model while nobody waits; False where somebody came in between."""
        engine, loaded = self._engine, self._loaded
        assert engine is not None
        assert loaded is not None
        assert self._residency is not None
        async with self._residency.undisturbed():
            if not await asyncio.to_thread(engine.measure_again, key):
                return False
            warmed = loaded.warmed[key]
            self._fits[key] = RunningFit(warmed.calibration)
            self.inference.change_budget(key, _budget(loaded, key), _lowest_rate(loaded))
        return True

    async def _load(self) -> Loaded:
        self.health.update(Phase.LOADING, 0, "importing torch")
        # torch takes seconds to import: the port answers meanwhile.
        module = await asyncio.to_thread(import_module, "vecmill.engine.engine")
        folder = self.state.folder
        kept = None if folder is None else folder.file(MEASUREMENTS)
        engine: Engine = module.Engine(self._settings.model, self._settings.engine, self._report, kept, at_once=True)
        self._engine = engine
        engine.start()
        loaded = await _result(engine.loaded)
        served = [
            (known.card, (model.checkpoint, model.tokenizer) if (model := loaded.models.get(key)) else None)
            for key, known in loaded.known.items()
        ]
        models = await asyncio.to_thread(assemble, served, self._settings.inference, self._threads)
        budgets = {key: _budget(loaded, key) for key in loaded.warmed}
        fairness = self._settings.scheduler
        rules = Rules(fairness.bulk_share, fairness.aging_seconds)
        self._scheduler = Scheduler(
            engine,
            budgets,
            rules,
            on_batch=self._pass_ended,
            on_failure=self._fail,
            expected_seconds=lambda model, tokens: self._fits[model].calibration.seconds(tokens),
        )
        endpoints = batch_endpoints(self.inference, self._threads, self._settings.inference)
        self._loaded = loaded
        self._fits = {key: RunningFit(warmed.calibration) for key, warmed in loaded.warmed.items()}
        self._residency = residency = self._make_residency(loaded)
        self._catalogue = self._make_catalogue(residency)
        self.inference.attach(models, self._scheduler, residency, self.state.cache, expected_rate=_lowest_rate(loaded))
        self.state.batches.start(endpoints, lambda: self.trouble is not None)
        if self._uses_gpu():
            await asyncio.to_thread(self.monitor.watch, Watched(engine.gpu_uuid, engine.memory))
        return loaded

    def _make_residency(self, loaded: Loaded) -> Residency:
        residency = Residency(
            self._settings.model,
            self._load_model,
            self._unload_model,
            has_rows=self.inference.has_rows,
            shortage=self._shortage,
            put_to_sleep=partial(self._unload_model, sleep=True),
            asleep=lambda: {} if self._engine is None else self._engine.asleep,
            most_waiting=self._settings.inference.max_concurrent_requests,
        )
        for key, known in loaded.known.items():
            is_loaded = key in loaded.models
            size = _bytes_of(known.card, loaded.warmed[key]) if is_loaded else known.card.weight_bytes
            residency.add(known.card, size, is_loaded=is_loaded)
        residency.warn_of_unknown()
        return residency

    def _make_catalogue(self, residency: Residency) -> Catalogue:
        token = self._settings.model.hf_token
        return Catalogue(
            residency,
            self._find_cached,
            lambda: asyncio.to_thread(_listed_in_cache),
            token.get_secret_value() if token is not None else None,
        )

    async def _load_model(self, key: str, progress: Progress) -> tuple[ModelCard, int]:
        """Load a model while others are served."""
        engine, loaded = self._engine, self._loaded
        assert engine is not None
        assert loaded is not None
        model = await _result(engine.load(key, self._start_progress(key, progress)))
        files = model.checkpoint, model.tokenizer
        try:
            served = await asyncio.to_thread(assemble_one, model.card, files, self._settings.inference, self._threads)
        except Exception:
            await _result(engine.unload(key))
            raise
        warmed = loaded.warmed[key]
        self._fits[key] = RunningFit(warmed.calibration)
        card = self.inference.exchange(served, _budget(loaded, key), _lowest_rate(loaded))
        self._has_loaded.set()
        return card, _bytes_of(model.card, warmed)

    def _pass_ended(self, batch: PassRecord) -> None:
        """Count a forward pass, and let the fit of its model, and so its budget, follow what it took."""
        self.telemetry.batch(batch)
        fit, loaded = self._fits.get(batch.model), self._loaded
        if fit is None or loaded is None or batch.failed or batch.splits or not batch.representative:
            return
        if fit.add(batch.tokens, batch.seconds):
            before = loaded.warmed[batch.model]
            now = before.refitted(fit.calibration, self._settings.engine.max_batch_ms / 1000)
            loaded.warmed[batch.model] = now
            self.inference.change_budget(batch.model, _budget(loaded, batch.model), _lowest_rate(loaded))
            if now.max_batch_tokens != before.max_batch_tokens:
                logger.info(
                    "%s: a forward pass takes %.1f ms + %.1f µs a token by now; up to %d tokens at a time, not %d",
                    loaded.known[batch.model].card.id,
                    1000 * now.calibration.fixed_seconds,
                    1e6 * now.calibration.seconds_per_token,
                    now.max_batch_tokens,
                    before.max_batch_tokens,
                )

    async def _unload_model(self, key: str, *, sleep: bool = False) -> None:
        assert self._engine is not None
        self.inference.forget_tokenizer(key)
        await _result(self._engine.unload(key, sleep=sleep))

    async def _close_models(self) -> None:
        if self._afterwards is not None:
            self._afterwards.cancel()
            await asyncio.gather(self._afterwards, return_exceptions=True)
        if self._catalogue is not None:
            await self._catalogue.close()
        if self._residency is not None:
            await self._residency.close()

    async def _shortage(self, weight_bytes: int) -> str | None:
        """Why weights do not fit now: into the GPU's memory, or the machine's where that is the models' own."""
        assert self._engine is not None
        if self._uses_gpu():
            return await asyncio.to_thread(self._engine.shortage, weight_bytes)
        return self._memory.shortage(weight_bytes)

    async def _find_cached(self, name: str, revision: str | None, task: Task | None) -> Cached | None:
        engine = self._engine
        assert engine is not None

        def find() -> Cached | None:
            folder = import_module(HUB).cached(name, revision)
            if folder is None:
                return None
            card = engine.add_cached(folder, name, task).card
            return Cached(card, card.weight_bytes)

        return await asyncio.to_thread(find)

    def _report(self, percent: float, message: str) -> None:
        self.health.update(Phase.LOADING, percent, message)

    def _fail(self, reason: str) -> None:
        self.health.fail(reason)
        self._on_failure(reason)

    def _uses_gpu(self) -> bool:
        return self._loaded is not None and self._loaded.device.type == "cuda"

    @property
    def trouble(self) -> str | None:
        """Why the device does not get on: it has failed, or hangs; None while it does."""
        phase, _, message = self.health.snapshot()
        if phase is Phase.FAILED:
            return message
        return self._hung()

    def _knee_of(self, key: str) -> int:
        warmed = self._loaded.warmed.get(key) if self._loaded else None
        return 0 if warmed is None else warmed.calibration.knee_tokens

    def _hung(self) -> str | None:
        return self._engine.hung if self._engine else None

    @property
    def busy(self) -> bool:
        """True while a thread loads or computes. Such a thread cannot be stopped; it ends with the process."""
        loading = self._loaded is None and self.health.snapshot()[0] is not Phase.FAILED
        return loading or (self._engine is not None and self._engine.alive)

    def begin_to_drain(self) -> None:
        """Be unready, so that what balances the load sends its requests elsewhere; those that come are still taken."""
        self.health.update(Phase.DRAINING, 100, "stopping: requests are still taken for a moment (DRAIN_SECONDS)")

    def begin_to_stop(self) -> None:
        """Refuse new work; end whoever follows the jobs, which have no end of their own."""
        self.health.update(Phase.DRAINING, 100, "stopping: requests in progress are answered")
        self.requests.stop()
        self.bodies.stop()
        self.replicas.tell_now()
        self.state.jobs.end_following()
        self.doctor.refuse()
        if self.live is not None:
            self.live.end()

    async def close(self) -> None:
        """Refuse new work, let what runs end if it soon does, fail what waits, end the threads."""
        self.begin_to_stop()
        await self.doctor.close()
        await self.state.batches.close()
        await self._close_models()
        if self.generation is not None:
            await self.generation.close()
        if self._scheduler is not None:
            await self._scheduler.close()
        if self._engine is not None:
            await asyncio.to_thread(self._engine.keep_measured)
            self._engine.close()
        self._threads.shutdown()
        await self.sampler.close()
        await self.replicas.close()
        await self.inference.admission.close()
        await self.state.close()
        await asyncio.to_thread(self.monitor.close)
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close)


def create_app(
    settings: Settings,
    on_failure: Callable[[str], None] = lambda reason: None,
    on_loaded: Callable[[], None] = lambda: None,
) -> FastAPI:
    """The application; models load once its lifespan starts.

    `on_failure` is called, in the event loop, with one sentence when the server can never serve (again); `on_loaded`
    before the first request is served.
    """
    server = Server(settings, on_failure, on_loaded)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await server.open()
        app.state.loading = loading = asyncio.create_task(server.load(), name="load")
        yield
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        await server.close()

    app = FastAPIOffline(
        title="vecmill",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # `api_document` has it, with a policy for its scripts
        redoc_url=None,
        # Weaviate sends JSON without a Content-Type. What FastAPI would guard by it, `Access` guards by the Origin.
        strict_content_type=False,
        redirect_slashes=False,  # `RequestLine` has taken them off
    )
    app.state.server, app.state.services = server, server.services
    app.state.progress = {}
    app.state.doctor = server.doctor
    server.live = app.state.live = Live(
        Snapshots(app, server.services, server.machine, server.replicas), server.sampler
    )
    first, *others = (dialect.router for dialect in registry.DIALECTS)
    routers = [first, registry.shared, *others]  # the API's document has them in this order
    routers += [files.router, batches.router, jobs.router, jobs.deprecated]
    routers += [capabilities.router, models.router, health.router, stats.router]
    routers += [live.router, replicas.router, doctor.router, page.router]
    for router in routers:
        app.include_router(router)
    errors.install(app, registry.shape_for, registry.dialect_name)
    api_document.install(app, routers)
    app.add_middleware(
        BodyLimit,
        bodies=server.bodies,
        threads=server.services.threads,
        request_timeout=settings.scheduler.request_timeout,
        not_in_memory=(files.UPLOAD,),
    )
    app.add_middleware(AcceptedGZip)
    app.add_middleware(Draining, requests=server.requests)
    app.add_middleware(
        Access,
        settings=settings.access,
        keys=server.keys,
        host=settings.http.host,
        on_job=server.state.jobs.touch,
    )
    app.add_middleware(Cors, origins=Origins(settings.access.cors_origins))
    app.add_middleware(RequestLine)
    app.add_middleware(
        RequestLog,
        log_requests=settings.log.log_requests,
        tracing=lambda: server.tracing,
        replica=settings.http.replica,
    )
    if proxies := settings.access.trusted_proxies:
        app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=in_both_families(proxies))
    return app


def _budget(loaded: Loaded, key: str) -> Budget:
    """Of a model. On a CPU no bulk is added to a search's pass: a search goes before bulk, and more tokens delay it."""
    warmed = loaded.warmed[key]
    free_tokens = 0 if loaded.device.type == "cpu" else warmed.free_tokens
    return Budget(warmed.max_batch_tokens, warmed.max_batch_size, free_tokens)


def _lowest_rate(loaded: Loaded) -> float:
    """Tokens a second of the slowest model that is loaded; 0 where none is."""
    return min((loaded.warmed[key].calibration.best_rate for key in list(loaded.models)), default=0.0)


def _bytes_of(card: ModelCard, warmed: Warmed) -> int:
    """What a loaded model takes."""
    return card.weight_bytes + warmed.graph_memory_bytes


def _listed_in_cache() -> Sequence[str]:
    names: Sequence[str] = import_module(HUB).listed_in_cache()
    return names


async def _result(future: Future[T]) -> T:
    """Await a future that another thread resolves; returns its result or raises its exception.

    Cancelling this coroutine does not cancel the future. `asyncio.wrap_future` would cancel it, and the thread that
    resolves it later would fail; shielded, it would log an exception that nobody waits for any more.
    """
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def tell(_: object) -> None:
        with suppress(RuntimeError):  # the event loop is closed
            loop.call_soon_threadsafe(done.set)

    future.add_done_callback(tell)
    await done.wait()
    return future.result()


def _tell_clock(verdict: ClockVerdict) -> None:
    logger.log(logging.WARNING if verdict.bad else logging.INFO, "GPU clocks: %s", verdict.message)


def _set_thread_defaults() -> None:
    """Keep the libraries' threads from fighting over the cores. Read when the libraries load, so set before that."""
    # The pool's threads are the parallelism; the tokenizers' own would come on top.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # OpenMP's threads spin while they wait for each other. On two cores beside another busy process a forward pass of
    # 0.09 s then takes more than 0.7 s; with a short spin 0.16 s, and alone it costs nothing that can be measured.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
