"""`blockrag serve`: the model behind HTTP."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blockrag.cli.directory import Settings, built_with, model_name
from blockrag.cli.options import (
    AsJson,
    AttentionOption,
    Device,
    Dtype,
    MaxNewTokens,
    Model,
    NamespaceOption,
    OnMissChoice,
    OnMissOption,
    PrecisionOption,
    attention_of,
    precision_of,
)
from blockrag.cli.output import Output, quiet_transformers, reporting
from blockrag.errors import InputError, MissingDependencyError
from blockrag.stores import parse_bytes

if TYPE_CHECKING:
    from blockrag.codec import Precision
    from blockrag.index import PassageIndex
    from blockrag.model.block_model import Attention, BlockModel
    from blockrag.model.running import OnMiss

__all__ = ["serve"]

Store = Annotated[
    str | None,
    typer.Option("--store", help="Where blocks are kept, e.g. disk:///path?max_bytes=200GB; by default in memory."),
]
PathOption = Annotated[
    Path | None,
    typer.Option("--path", envvar="BLOCKRAG_PATH", help="Directory of an index: its blocks, and its passages."),
]
Host = Annotated[str, typer.Option("--host", help="Address to listen on; others than this machine's need a key.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="0 for a free one.")]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar="BLOCKRAG_API_KEY",
        help="What clients must send; better in the environment, where others cannot see it.",
    ),
]
MaxConcurrent = Annotated[int, typer.Option("--max-concurrent", min=1, help="Requests answered side by side.")]
MaxQueue = Annotated[int, typer.Option("--max-queue", min=0, help="Requests that may wait; others get 503.")]
MaxBody = Annotated[str, typer.Option("--max-body", help="Longest request, e.g. 8MiB; longer ones get 413.")]
Timeout = Annotated[float, typer.Option("--timeout", help="Seconds a request may take, waiting included.")]
ShutdownTimeout = Annotated[
    float, typer.Option("--shutdown-timeout", help="Seconds for answers in progress when the server is stopped.")
]


def serve(
    model: Model = None,
    store: Store = None,
    path: PathOption = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: ApiKey = None,
    max_concurrent: MaxConcurrent = 4,
    max_queue: MaxQueue = 64,
    max_body: MaxBody = "8MiB",
    timeout: Timeout = 300.0,
    shutdown_timeout: ShutdownTimeout = 30.0,
    max_new_tokens: MaxNewTokens = 256,
    attention: AttentionOption = None,
    precision: PrecisionOption = None,
    namespace: NamespaceOption = "",
    on_miss: OnMissOption = OnMissChoice.compute,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Serve a model with the OpenAI API; requests bring documents, or have those of --path searched.

    Stops at SIGTERM or Ctrl-C, when the answers in progress are complete. With --json, standard output gets one object
    with the server's address when it takes requests.
    """
    with reporting(as_json) as out:
        _require_server()
        from blockrag.server import ServerSettings, check_exposure, create_app, listen
        from blockrag.server import serve as run

        if namespace and path is not None:
            raise InputError(
                f"--namespace is for a --store that several share; the blocks of the directory {path} were stored "
                "without one, and are nobody else's: leave it out"
            )
        chosen = _settings(model, store, path, attention=attention_of(attention), precision=precision_of(precision))
        settings = ServerSettings(
            model_name=_served_name(chosen.model),
            api_key=api_key,
            max_concurrent=max_concurrent,
            max_queue=max_queue,
            max_body_bytes=parse_bytes(max_body),
            timeout_s=timeout,
            shutdown_s=shutdown_timeout,
            max_new_tokens=max_new_tokens,
        )
        check_exposure(host, api_key)
        with listen(host, port) as bound:
            url = f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}"
            opened = _open(
                out, chosen, store, path, namespace=namespace, on_miss=on_miss.value, device=device, dtype=dtype
            )
            with opened as (language_model, index):

                def ready() -> None:
                    out.note(f"serving {settings.model_name} at {url}/v1; stop it with Ctrl-C")
                    out.result({"url": url, "model": settings.model_name, "pid": os.getpid()})

                run(create_app(language_model, settings, index=index), bound, on_ready=ready)
        out.note("stopped")


def _require_server() -> None:
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"`blockrag serve` needs {', '.join(missing)}; install it with: pip install 'blockrag[server]'"
        )


def _settings(
    model: str | None,
    store: str | None,
    path: Path | None,
    *,
    attention: Attention | None,
    precision: Precision | None,
) -> Settings:
    """What to serve: what a directory remembers, changed by what was asked for."""
    if path is None and model is None:
        raise InputError(
            "there is nothing to serve; pass --model (demo ships with blockrag), or the --path of an index"
        )
    if path is not None and store is not None:
        raise InputError(f"--store {store!r} and --path {str(path)!r} both say where blocks are; pass one of them")
    found = (None if path is None else built_with(path)) or Settings()
    return replace(
        found,
        model=found.model if model is None else model_name(model),
        attention=attention or found.attention,
        precision=precision or found.precision,
    )


def _served_name(model: str) -> str:
    """What clients call it: a hub id as it is, a directory by its name."""
    return Path(model).name if Path(model).is_absolute() else model


@contextmanager
def _open(
    out: Output,
    settings: Settings,
    store: str | None,
    path: Path | None,
    *,
    namespace: str,
    on_miss: OnMiss,
    device: str,
    dtype: str,
) -> Iterator[tuple[BlockModel, PassageIndex | None]]:
    """The model, and the index of a directory; their files are closed at the end."""
    with ExitStack() as stack, out.working(f"loading {settings.model} ..."):
        quiet_transformers()
        if path is None:
            from blockrag.model.block_model import BlockModel
            from blockrag.stores import open_store

            model = BlockModel.from_pretrained(
                settings.model,
                store=None if store is None else open_store(store),
                attention=settings.attention,
                precision=settings.precision,
                namespace=namespace,
                on_miss=on_miss,
                device=device,
                dtype=dtype,
            )
            stack.enter_context(closing(model.store))
            index = None
        else:
            from blockrag.rag import BlockRAG

            rag = stack.enter_context(
                BlockRAG.from_pretrained(
                    settings.model,
                    encoder=settings.encoder,
                    path=path,
                    attention=settings.attention,
                    precision=settings.precision,
                    max_bytes=settings.max_bytes,
                    on_miss=on_miss,
                    device=device,
                    dtype=dtype,
                )
            )
            model, index = rag.model, rag.index
        opened = stack.pop_all()
    with opened:
        yield model, index
