"""``metaflow hf demo-hub``: the hub that the demo uses, for people without network."""

import contextlib
import signal
import threading
from collections.abc import Iterator

from metaflow._vendor import click

from metaflow_hf.demo.catalog import DATASET_ID, MODEL_ID, demo_content
from metaflow_hf.demo.content import HubContent
from metaflow_hf.demo.server import HubServer


@click.command(help="Serve the embedded hub on localhost until Ctrl-C.")
@click.option(
    "--port", default=0, show_default="a free one", type=click.IntRange(0, 65535), help="Port to listen on."
)
@click.option(
    "--fixtures/--no-fixtures",
    default=False,
    show_default=True,
    help="Also serve tiny stand-ins for well-known repositories (bert-base-uncased, gpt2, …).",
)
def command(port: int, fixtures: bool) -> None:
    """Serve until a signal comes; exit code 0 then."""
    content = _fixture_content() if fixtures else demo_content()
    try:
        server = HubServer(content, port)
    except OSError as error:
        raise click.ClickException(
            f"cannot listen on 127.0.0.1:{port}: {error.strerror}. Choose another --port."
        ) from error
    stop = threading.Event()
    with server, _stopping_on_signals(stop):
        click.echo(_welcome(server, content))
        stop.wait()
    click.echo("stopped")


def _fixture_content() -> HubContent:
    from metaflow_hf_cli.fixtures import fixture_content

    return fixture_content(reject_unknown_tokens=False)  # people have a real token in their environment


@contextlib.contextmanager
def _stopping_on_signals(stop: threading.Event) -> Iterator[None]:
    previous = {
        number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _welcome(server: HubServer, content: HubContent) -> str:
    models = "\n".join(f"  {repo.repo_id}" for repo in content.repos("model") if not repo.private)
    datasets = "\n".join(f"  {repo.repo_id}" for repo in content.repos("dataset") if not repo.private)
    return f"""The hub is at {server.url}

Use it from another terminal:
  export HF_ENDPOINT={server.url} HF_HUB_DISABLE_XET=1
  python -c "from huggingface_hub import snapshot_download; print(snapshot_download('{MODEL_ID}'))"
  python -c "from datasets import load_dataset; print(load_dataset('{DATASET_ID}'))"

Models:
{models}
Datasets:
{datasets}

Ctrl-C stops it."""
