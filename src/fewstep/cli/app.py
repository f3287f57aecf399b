"""``fewstep app``: a page on which a model is tried."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.options import Device, ModelName, print_text

app = typer.Typer()


@app.command("app", epilog="Example: fewstep app runs/demo")
def serve_app(
    model_name: ModelName,
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The teacher beside it. Default: of a run, that of its config.")
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen on; the default is for this machine alone.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on; 0 takes a free one.")] = 7860,
    device: Device = "auto",
) -> None:
    """Open a page in the browser to try a model: teacher and student side by side, from the same noise.

    Needs the extra app. Nothing is sent to another machine.
    """
    from fewstep.api.app import AppModels
    from fewstep.api.app_page import require_gradio, serve
    from fewstep.api.models import name_of

    require_gradio()
    models = AppModels.load(model_name, teacher, device)
    name = name_of(model_name) if Path(model_name).exists() else model_name
    serve(models, name, host, port, lambda address: print_text(f"Open {address} in a browser; Ctrl-C ends it."))
