"""`braidlora site`: a federation between machines, on Flower."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from braidlora.cli._common import print_json, verb
from braidlora.errors import ConfigError
from braidlora.terminal import say


def add(verbs: Any) -> None:
    text = "set up, serve, join and monitor a federation across machines (needs braidlora[fed])"
    parser = verbs.add_parser(
        "site", help=text, description=f"{text[0].upper()}{text[1:]}. docs/howto/deploy.md has all steps."
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    init = verb(actions, "init", _init, "create the folder of the server or of a site", overrides=False)
    init.add_argument("folder", type=Path, help="folder to create")
    role = init.add_mutually_exclusive_group(required=True)
    role.add_argument("--server", action="store_true", help="the server's folder")
    role.add_argument("--name", help="a site's folder: the name of its client in the recipe")
    init.add_argument("--host", help="server: where it listens (default: 127.0.0.1, this machine only)")
    init.add_argument(
        "--port",
        type=int,
        help="server: port of the SuperLink (default: 9092); site: port of its own interface (default: 9094)",
    )
    init.add_argument(
        "--reached-as", action="append", metavar="NAME", help="server: a name or address that sites use; repeatable"
    )  # fmt: skip
    init.add_argument("--superlink", metavar="HOST:PORT", help="site: address of the server")
    init.add_argument("--recipe", help="site: the federated recipe; it is copied")
    init.add_argument("--ca", type=Path, metavar="FILE", help="site: the CA certificate, ca.crt")
    init.add_argument(
        "--insecure", action="store_true", help="no TLS and no node authentication; loopback address only"
    )

    bind = verb(actions, "add", _add, "on the server: register the public key of a site", overrides=False)
    bind.add_argument("folder", type=Path, help="the server's folder")
    bind.add_argument("name", help="name of the client in the recipe")
    bind.add_argument("key", type=Path, help="the site's node.pub")

    serve = verb(actions, "serve", _serve, "run the server's SuperLink until it is stopped", overrides=False)
    serve.add_argument("folder", type=Path, help="the server's folder")

    join = verb(actions, "join", _join, "connect a site until it is stopped", overrides=False)
    join.add_argument("folder", type=Path, help="the site's folder")
    join.add_argument(
        "--accept-fresh-state", action="store_true", help="set the state aside if the server asks to start from scratch"
    )  # fmt: skip

    status = verb(
        actions, "status", _status, "on the server: show rounds, sites, bytes and losses", overrides=False
    )
    status.add_argument("folder", type=Path, help="the server's folder")


def _init(args: argparse.Namespace, overrides: list[str]) -> None:
    from braidlora.federated.flower.environment import check_installed
    from braidlora.federated.flower.init import init_server, init_site

    check_installed()
    if args.server:
        _reject(args, "a site's folder", "superlink", "recipe", "ca")
        written = init_server(
            args.folder,
            args.host or "127.0.0.1",
            9092 if args.port is None else args.port,
            args.reached_as or (),
            insecure=args.insecure,
        )
        then = (
            "No TLS and no keys: for tests on this machine only."
            if args.insecure
            else f"Send tls/ca.crt to the sites. Register each site: braidlora site add {args.folder} NAME NODE.pub."
        )
        then += f" Then: braidlora site serve {args.folder}"
    else:
        _reject(args, "the server's folder", "host", "reached_as")
        if args.superlink is None:
            raise ConfigError("--name: a site needs --superlink HOST:PORT.")
        written = init_site(
            args.folder,
            args.name,
            args.superlink,
            args.recipe,
            args.ca,
            9094 if args.port is None else args.port,
            insecure=args.insecure,
        )
        then = "Set `data` and `model` in site.yaml."
        if not args.insecure:
            then += " Send node.pub to the server's operator."
            if not (args.folder / "ca.crt").is_file():
                then += f" Copy the server's tls/ca.crt to {args.folder / 'ca.crt'}."
        if args.recipe is None:
            then += f" Copy the federation's recipe to {args.folder / 'recipe.yaml'}."
        then += f" Then: braidlora site join {args.folder}"
    if args.json:
        print_json({"folder": str(args.folder), "written": [str(path) for path in written]})
        return
    for path in written:
        say(str(path))
    say(then)


def _reject(args: argparse.Namespace, owner: str, *options: str) -> None:
    for option in options:
        if getattr(args, option) is not None:
            raise ConfigError(f"--{option.replace('_', '-')} applies to {owner}.")


def _add(args: argparse.Namespace, overrides: list[str]) -> None:
    from braidlora.federated.flower.environment import check_installed
    from braidlora.federated.flower.init import add_site

    check_installed()
    add_site(args.folder, args.name, args.key)
    if args.json:
        print_json({"folder": str(args.folder), "site": args.name})
        return
    say(f"{args.name}: added key {args.key}. A running `braidlora site serve` registers it within seconds.")


def _serve(args: argparse.Namespace, overrides: list[str]) -> None:
    from braidlora.federated.flower.serve import serve

    with _until_stopped():
        serve(args.folder, _say_now)


def _join(args: argparse.Namespace, overrides: list[str]) -> None:
    from braidlora.federated.flower.join import join

    with _until_stopped():
        join(args.folder, _say_now, accept_fresh=args.accept_fresh_state)


def _status(args: argparse.Namespace, overrides: list[str]) -> None:
    from braidlora.federated.flower.site_status import format_status, site_status

    found = site_status(args.folder)
    if args.json:
        print_json(found)
        return
    say(format_status(found))


def _say_now(text: str) -> None:
    say(text)
    sys.stdout.flush()


class _until_stopped:  # noqa: N801 (a context)
    """Turns SIGTERM into the KeyboardInterrupt of Ctrl-C; ending a service that way is no failure."""

    def __enter__(self) -> None:
        import signal

        def stop(number: int, frame: Any) -> None:
            raise KeyboardInterrupt

        self._before = signal.signal(signal.SIGTERM, stop)

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> bool:
        import signal

        signal.signal(signal.SIGTERM, self._before)
        if kind is KeyboardInterrupt:
            say("stopped.")
            return True
        return False
