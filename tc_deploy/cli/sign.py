"""``tc-deploy sign`` and ``tc-deploy verify``: a team's own bundles, told from others'."""

from __future__ import annotations

from pathlib import Path

import click

from tc_deploy.cli.help import GroupedCommand, option
from tc_deploy.cli.options import PATH
from tc_deploy.errors import counted, printable
from tc_deploy.manifest import SIGNATURE
from tc_deploy.signing import SignatureRecord, sign_bundle, verify_bundle

MOST_NAMED = 5
"""Of what a signature does not cover."""


@click.command(cls=GroupedCommand)
@click.argument("bundle", type=PATH)
@option(
    "--key",
    required=True,
    type=PATH,
    help="Private ed25519 key in PEM: openssl genpkey -algorithm ed25519 -out key.pem",
)
def sign(bundle: Path, key: Path) -> None:
    """Sign BUNDLE (engines/NAME) and the engines built in it, as they stand.

    Build first: engines that are built later are not signed. The password of an encrypted key is taken from
    TC_DEPLOY_KEY_PASSWORD.
    """
    record = sign_bundle(bundle, key)
    click.echo(f"{bundle / SIGNATURE}: signed the bundle{_with_engines(record)}")


@click.command(cls=GroupedCommand)
@click.argument("bundle", type=PATH)
@option(
    "--key",
    required=True,
    type=PATH,
    help="The signer's public key in PEM: openssl pkey -in key.pem -pubout -out key.pub.pem",
)
def verify(bundle: Path, key: Path) -> None:
    """Check who signed BUNDLE (engines/NAME), and that every file is as it was signed.

    What lies in it and was never signed is named, and is no failure: no command reads it, but for the kernels that
    TensorRT-RTX keeps beside its engines.
    """
    found = verify_bundle(bundle, key)
    click.echo(f"{bundle}: signed by {key}, every file is as it was signed: the bundle{_with_engines(found.record)}")
    if found.uncovered:
        names = ", ".join(map(printable, found.uncovered[:MOST_NAMED]))
        more = len(found.uncovered) - MOST_NAMED
        click.echo(f"not covered by the signature: {names}{f' and {more} more' if more > 0 else ''}")


def _with_engines(record: SignatureRecord) -> str:
    targets = sorted(name.partition("/")[0] for name in record.signs if "/" in name)
    return f" and {counted(len(targets), 'target')} ({', '.join(targets)})" if targets else ", no engines"
