"""``python -m deployments MODEL [key=value ...]``: a Ray of its own, until a signal."""

from __future__ import annotations

import argparse
import logging
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import httpx

from deployments.options import parse_args
from deployments.port import held_port
from deployments.session import in_own_session
from deployments.tuning import tune
from giantserve.errors import ConfigError, EngineDeadError, GiantserveError
from giantserve.executor.launcher import ENVIRONMENT_NAME, Launcher, remove_dead
from giantserve.interrupts import no_lost_interrupts
from giantserve.planning import check
from partition.errors import PlanError

if TYPE_CHECKING:
    from ray import serve

OBJECT_STORE_BYTES = 128 * 2**20
FOLDER_PREFIX, SOCKET_NAME = "giantserve-", "launcher"
READY_TIMEOUT_S = 60.0
LOADING_PERIOD_S = 0.1
DRAIN_MARGIN_S = 10.0

logger = logging.getLogger("deployments")


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM; 0 after a clean end, 1 and a line on stderr after an error."""
    arguments = _parser().parse_intermixed_args(argv)
    try:
        with no_lost_interrupts(), held_port(arguments.host, arguments.port):
            options = {"model": arguments.model, **_key_values(arguments.options)}
            check(parse_args(options)[0])
            tune()
            with _launcher() if arguments.address == "local" else nullcontext():
                _serve(options, arguments)
    except (GiantserveError, PlanError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m deployments", description=__doc__)
    parser.add_argument("model", help="the checkpoint folder")
    parser.add_argument("options", nargs="*", metavar="key=value", help="as for deployments.app")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--address", default="local", help="a running Ray cluster to join")
    return parser


def _key_values(pairs: Sequence[str]) -> dict[str, str]:
    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"'{pair}' is not key=value")
        options[name] = value
    return options


@contextmanager
def _launcher() -> Iterator[None]:
    """Forks what needs torch on this machine, of this server: it imports while Ray starts."""
    remove_dead(Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*/{SOCKET_NAME}"))
    with tempfile.TemporaryDirectory(prefix=FOLDER_PREFIX) as folder:
        path = Path(folder) / SOCKET_NAME
        with closing(Launcher(listen=path)):
            os.environ[ENVIRONMENT_NAME] = str(path)
            yield


def _serve(options: dict[str, str], arguments: argparse.Namespace) -> None:
    import ray

    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    started_s = time.monotonic()
    try:
        with ThreadPoolExecutor(2) as beside:
            planned = beside.submit(_build, options)  # while Ray starts
            _start_ray(arguments, os.cpu_count() or 1)
            proxies = beside.submit(_start_serve, arguments)
            app = planned.result()
            if arguments.address == "local" and _num_cpus(app) > (os.cpu_count() or 1):
                proxies.result()
                ray.shutdown()
                _start_ray(arguments, _num_cpus(app))
                proxies = beside.submit(_start_serve, arguments)
            _check_room(app, is_own=arguments.address == "local")
            _wait_for_controller(proxies)
            _run(app)  # while the proxies start
            proxies.result()
        url = f"http://{_reachable(arguments.host)}:{arguments.port}"
        _wait_until_routed(url)
        print(f"ready: {url}/v1 after {time.monotonic() - started_s:.1f} s", flush=True)
        _wait_until_loaded(app._bound_deployment.num_replicas or 1)
        print(f"loaded after {time.monotonic() - started_s:.1f} s", flush=True)
        while True:
            signal.pause()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if ray.is_initialized():
            try:
                _delete_app(parse_args(options)[1].drain_timeout_s)
            finally:
                ray.shutdown()


def _start_ray(arguments: argparse.Namespace, num_cpus: int) -> None:
    """Join the cluster, or start a Ray of our own. Takes the signals that end the server back from
    Ray, which sets handlers of its own."""
    import ray

    local = arguments.address == "local"
    ray.init(
        address=arguments.address,
        include_dashboard=False if local else None,
        num_cpus=num_cpus if local else None,
        object_store_memory=OBJECT_STORE_BYTES if local else None,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)


def _start_serve(arguments: argparse.Namespace) -> None:
    """Returns when the proxies listen."""
    from ray import serve
    from ray.serve.config import HTTPOptions
    from ray.serve.schema import LoggingConfig

    serve.start(
        http_options=HTTPOptions(host=arguments.host, port=arguments.port, request_timeout_s=None),
        logging_config=LoggingConfig(enable_access_log=False, log_level="WARNING"),
    )


def _wait_for_controller(starting: Future[None]) -> None:
    """Until Serve's controller exists, from when on applications can be deployed."""
    from ray.util import list_named_actors

    while not starting.done():
        if any(actor["namespace"] == "serve" for actor in list_named_actors(all_namespaces=True)):
            return
        time.sleep(0.01)
    starting.result()


def _build(options: Mapping[str, str]) -> serve.Application:
    from deployments.app import build_app

    return build_app(options)


def _delete_app(drain_timeout_s: float) -> None:
    """Returns when its replicas have drained; says so where they have not in time."""
    from ray import serve

    from deployments.app import APP_NAME

    give_up_s = time.monotonic() + drain_timeout_s + DRAIN_MARGIN_S
    while time.monotonic() < give_up_s:
        with suppress(TimeoutError):  # Serve itself waits for a minute, however long they may drain
            serve.delete(APP_NAME)
            return
    logger.warning("the replicas have not ended in time; what they still do is cut off")


def _run(app: serve.Application) -> None:
    """Deploy and wait. Raises EngineDeadError with the last line of what the replica said."""
    from ray import serve

    from deployments.app import APP_NAME
    from deployments.loading import forget_loading, shown_loading

    forget_loading()
    try:
        with shown_loading():
            serve.run(app, name=APP_NAME, route_prefix="/")
    except RuntimeError as error:
        status = serve.status().applications.get(APP_NAME)
        messages = [d.message for d in status.deployments.values()] if status else []
        lines = [line for line in "\n".join([str(error), *messages]).splitlines() if line.strip()]
        causes = [line for line in lines if "Error: " in line]
        said = (causes or lines)[-1].strip()
        raise EngineDeadError(said.rpartition("Error: ")[2] if causes else said) from None


def _wait_until_routed(url: str) -> None:
    """The proxy learns of the replica a moment after it is up.

    Any answer but the proxy's own will do.
    """
    give_up_s = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < give_up_s:
        try:
            answer = httpx.get(f"{url}/v1/models", timeout=5.0)
        except httpx.HTTPError:
            answer = None
        if answer is not None and answer.status_code in (200, 401):
            return
        time.sleep(0.05)
    raise EngineDeadError(f"{url} does not answer within {READY_TIMEOUT_S:.0f} s")


def _wait_until_loaded(num_replicas: int) -> None:
    """Requests are served meanwhile. Raises EngineDeadError where a load fails."""
    from deployments.loading import read_loading, shown_loading

    with shown_loading():
        while read_loading().num_loaded < num_replicas:
            time.sleep(LOADING_PERIOD_S)


def _num_cpus(app: serve.Application) -> int:
    """Ray's logical CPUs: those of the machine, or more where the bundles ask for it."""
    needed = sum(bundle.get("CPU", 0.0) for bundle in _bundles(app))
    return max(os.cpu_count() or 1, math.ceil(needed))


def _bundles(app: serve.Application) -> list[dict[str, float]]:
    """Those of all replicas."""
    deployment = app._bound_deployment
    bundles = deployment._replica_config.placement_group_bundles or []
    return bundles * (deployment.num_replicas or 1)


def _check_room(app: serve.Application, *, is_own: bool) -> None:
    """Whether Ray can ever place all replicas. Raises ConfigError where it is our own; another's
    may grow, and gets a line."""
    import ray

    from deployments.placement import missing

    resources: Any = ray.cluster_resources
    lacking = missing(_bundles(app), resources())
    if lacking and is_own:
        raise ConfigError(
            f"the replicas need {lacking}; lower num_replicas, tensor_parallel or "
            "pipeline_parallel, or join a bigger cluster with --address"
        )
    if lacking:
        logger.warning("waiting for a bigger cluster: the replicas need %s", lacking)


def _reachable(host: str) -> str:
    return "127.0.0.1" if host in ("", "0.0.0.0", "::") else host


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(in_own_session(main))
