"""The Ray Serve application: ``serve run deployments.app:build_app model=PATH ...``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.schema import LoggingConfig

from deployments.options import parse_args
from deployments.placement import bundles
from deployments.replica import PlannedOn, Replica
from giantserve.config import EngineConfig
from giantserve.planning import resolve
from giantserve.tier_check import check_asked
from partition.calibration import machine_name

APP_NAME = "giantserve"

logger = logging.getLogger(__name__)


def build_app(args: Mapping[str, Any]) -> serve.Application:
    """Plan the model and bind one deployment whose replicas each own an engine and its shards.

    ``args`` are the fields of `EngineConfig` and `DeploymentOptions`, values as text or as they are
    ("256MiB", "2", true). The plan made here fixes the number of shards, hence the bundles. A
    replica on this machine runs it; one on another plans so many shards for its own. Raises
    ConfigError for an unknown or wrong option, PlanError where no plan exists.
    """
    config, options = parse_args(args)
    config = _anywhere(replace(config, executor="ray"))
    resolution = resolve(config)
    plan = resolution.plan
    check_asked(config, plan)
    logger.info("plan: %s", " ".join(plan.reason.split()))
    config = replace(
        config,
        tensor_parallel=plan.tensor_parallel,
        pipeline_parallel=plan.pipeline_parallel,
        expert_parallel=plan.expert_parallel,
    )
    deployment = Replica.options(  # type: ignore[attr-defined]
        num_replicas=options.num_replicas,
        ray_actor_options={"num_cpus": options.cpus_per_replica},
        placement_group_bundles=bundles(plan, config, options),
        placement_group_strategy="PACK",
        max_ongoing_requests=options.max_ongoing_requests,
        health_check_period_s=options.health_check_period_s,
        health_check_timeout_s=options.health_check_timeout_s,
        graceful_shutdown_timeout_s=options.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.5,
        max_constructor_retry_count=1,
        logging_config=LoggingConfig(enable_access_log=False),
    )
    here = PlannedOn(machine_name(), resolution)
    return deployment.bind(config, options, here)  # type: ignore[no-any-return]


def _anywhere(config: EngineConfig) -> EngineConfig:
    """The config with paths that hold in the folder of a replica, too, under the same name."""
    return replace(
        config,
        model=str(Path(config.model).absolute()),
        served_model_name=config.served_model_name or config.model,
        nvme_dir=config.nvme_dir and config.nvme_dir.absolute(),
    )
