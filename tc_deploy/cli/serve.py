"""``tc-deploy serve``: built engines behind OpenAI's images API."""

from __future__ import annotations

from pathlib import Path

import click

from tc_deploy.bundle import real_path
from tc_deploy.cli.help import GroupedCommand, option
from tc_deploy.cli.options import PATH, Number
from tc_deploy.errors import UsageError
from tc_deploy.libraries import imported

MOST_SLOTS, MOST_QUEUE, MOST_SECONDS = 256, 100_000, 86_400.0


@click.command(cls=GroupedCommand)
@click.argument("bundles", type=PATH, nargs=-1, required=True)
@option("--host", default="127.0.0.1", show_default=True, help="Where to listen; 0.0.0.0 is every network.")
@option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@option(
    "--slots",
    type=click.IntRange(1, MOST_SLOTS),
    default=4,
    show_default=True,
    help="Images that are made at a time, of each bundle; its memory is taken at the start.",
)
@option(
    "--queue",
    type=click.IntRange(0, MOST_QUEUE),
    default=16,
    show_default=True,
    help="Images that wait for a slot; more are refused with 429.",
)
@option(
    "--timeout",
    type=Number(0.1, MOST_SECONDS),
    default=300.0,
    show_default=True,
    help="Seconds in which a request must be done, or it ends with 504.",
)
@option("--backend", help="Which of the bundles' engines.")
@option(
    "--policy",
    advanced=True,
    type=click.Choice(["aligned", "oldest-first"]),
    default="aligned",
    show_default=True,
    help="Which step is next: the cheapest, so that images meet at full ones, or the oldest image's.",
)
@option(
    "--watchdog",
    advanced=True,
    type=Number(1, MOST_SECONDS),
    default=120.0,
    show_default=True,
    help="Seconds without a step after which the server calls itself dead.",
)
@option(
    "--drain-delay",
    advanced=True,
    type=Number(0, 3600),
    default=0.0,
    show_default=True,
    help="Seconds at SIGTERM between being unready and refusing requests.",
)
@option(
    "--require-signature",
    advanced=True,
    metavar="KEY",
    type=PATH,
    envvar="TC_DEPLOY_REQUIRE_SIGNATURE",
    show_envvar=True,
    help="Refuse a bundle that the holder of this public key has not signed.",
)
def command(
    bundles: tuple[Path, ...],
    host: str,
    port: int,
    slots: int,
    queue: int,
    timeout: float,
    backend: str | None,
    policy: str,
    watchdog: float,
    drain_delay: float,
    require_signature: Path | None,
) -> None:
    """Serve BUNDLES (engines/NAME) over HTTP; NAME is the model's name.

    Clients need the key in TC_DEPLOY_API_KEY where that is set. SIGTERM finishes what was accepted and ends; SIGHUP
    loads the bundles anew, as does POST /admin/reload with the key in TC_DEPLOY_ADMIN_KEY.
    """
    by_name: dict[str, Path] = {}
    for path in bundles:
        name = real_path(path).name
        if name in by_name:
            raise UsageError(f"{path}: {by_name[name]} has the name {name} too; rename one of the folders")
        by_name[name] = path
    for module in ("fastapi", "prometheus_client", "uvicorn"):
        imported(module, purpose="the server is made of it: ")
    from tc_deploy.serving.engines import EngineSettings
    from tc_deploy.serving.scheduler import Policy
    from tc_deploy.serving.server import Settings, serve

    serve(
        by_name,
        Settings(
            host=host,
            port=port,
            engines=EngineSettings(
                slots=slots,
                queue=queue,
                policy=Policy(policy),
                backend=backend,
                require_signature=require_signature,
            ),
            timeout_s=timeout,
            watchdog_s=watchdog,
            drain_delay_s=drain_delay,
        ),
    )
