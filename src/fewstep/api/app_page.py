"""The page of ``fewstep app``, with Gradio.

Nothing on it reaches beyond this machine: no telemetry, no public link, and no file of another server, which a content
security policy refuses in the browser.
"""

from __future__ import annotations

import base64
import html
import io
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.api.app import ALL, MOST_IMAGES, AppModels, Request, Result, class_names
from fewstep.core.errors import UserError
from fewstep.core.image_grid import image_grid

KEPT = 12  # earlier results on the page
SMALL = 64  # pixels; smaller images are shown with sharp edges
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'"
CSS = Path(__file__).with_name("app.css")
Shown = tuple[str, list[str], str]  # the results, the earlier ones, and these as HTML


def require_gradio() -> Any:
    """Gradio, with its telemetry off. Raises ``UserError`` if it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise UserError("The app needs an extra: pip install 'fewstep[app]'.") from error
    return gradio


def serve(models: AppModels, name: str, host: str, port: int, started: Callable[[str], None]) -> None:
    """Serves the page until it is interrupted, which raises ``KeyboardInterrupt``; ``started`` receives its address.
    ``port`` 0 takes a free one. Raises ``UserError`` if the address cannot be used."""
    gradio = require_gradio()
    if not host.strip():
        raise UserError("--host is empty: give an address of this machine, such as 127.0.0.1 (0.0.0.0 is all of them).")
    import uvicorn
    from fastapi import FastAPI

    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise UserError(f"Cannot listen on {host}, port {port}: {error}. Choose another --port or --host.") from error
    server = FastAPI(openapi_url=None)

    @server.middleware("http")
    async def refuse_other_servers(request: Any, following: Any) -> Any:
        response = await following(request)
        response.headers["Content-Security-Policy"] = POLICY
        return response

    theme = gradio.themes.Default(primary_hue="orange", neutral_hue="slate", font="system-ui", font_mono="monospace")
    gradio.mount_gradio_app(
        server, page(models, name), "/", theme=theme, css_paths=CSS, footer_links=[], ssr_mode=False, mcp_server=False,
        enable_monitoring=False, pwa=False,
    )  # fmt: skip
    shown = f"[{host}]" if ":" in host else host
    started(f"http://{shown}:{listener.getsockname()[1]}/")
    # an open page keeps a connection, for which a server that stops would wait without an end
    uvicorn.Server(uvicorn.Config(server, log_level="error", timeout_graceful_shutdown=1)).run([listener])
    raise KeyboardInterrupt  # only a signal ends it, which its event loop may have taken for itself


def page(models: AppModels, name: str) -> Any:
    """The page, for a model that is called ``name``."""
    gradio, config = require_gradio(), models.model.config
    with gradio.Blocks(title=f"{name} · fewstep", analytics_enabled=False) as blocks:
        gradio.HTML(f"<h1>{html.escape(name)}</h1><p>{html.escape(describe(models))}</p>", elem_classes="fewstep-head")
        earlier = gradio.State([])
        steps_label = "Steps" if models.teacher is None else "Steps of the student"
        with gradio.Row():
            with gradio.Column(scale=1, min_width=260):
                if config.classes:
                    choices = [
                        ("all in turn", ALL),
                        *zip(class_names(models.model), range(config.classes), strict=True),
                    ]
                    subject = gradio.Dropdown(choices, value=ALL, label="Class")
                else:
                    subject = gradio.Textbox(label="Prompt", lines=3, placeholder="What should the image show?")
                steps = gradio.Slider(1, models.most_steps, models.default_steps, step=1, label=steps_label)
                n = gradio.Slider(1, MOST_IMAGES, 10 if config.classes else 4, step=1, label="Images")
                seed = gradio.Number(0, label="Seed", precision=0, minimum=0)
                button = gradio.Button("Generate", variant="primary")
            with gradio.Column(scale=3, min_width=300):
                results = gradio.HTML(message("Press Generate."), elem_classes="fewstep-results")
        shown = gradio.HTML(elem_classes="fewstep-history")
        gradio.on(
            [button.click, *([] if config.classes else [subject.submit])],
            lambda *values: click(models, *values),
            [subject, steps, seed, n, earlier], [results, earlier, shown], api_visibility="private",
        )  # fmt: skip
    return blocks


def describe(models: AppModels) -> str:
    """The model, and what stands beside it."""
    few_step = models.model.config.few_step
    if few_step is None:
        return "A many-step model."
    count = len(few_step.times)
    text = f"A student that generates in {count} network evaluation{'s'[: count - 1]}"
    return f"{text}, beside its teacher, from the same noise." if models.teacher is not None else f"{text}."


def click(models: AppModels, subject: Any, steps: Any, seed: Any, n: Any, earlier: Sequence[str]) -> Shown:
    """What the page shows after a click: images, or a message; earlier results stay."""
    try:
        request = models.check(subject, steps, seed, n)
        results = models.generate(request)
    except Exception as error:  # a page must not end in a traceback, nor the server
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return message(text, "alert"), list(earlier), gallery(earlier)
    subjects = models.subjects(request)
    kept = [thumbnail(results, caption(subjects, request)), *earlier][:KEPT]
    return "".join(figure(result, subjects, request.seed) for result in results), kept, gallery(kept[1:])


def message(text: str, role: str = "status") -> str:
    return f'<p class="fewstep-message" role="{role}">{html.escape(text)}</p>'


def caption(subjects: Sequence[str], request: Request) -> str:
    """A request in words."""
    what = "all classes" if request.subject == ALL and len(set(subjects)) > 1 else subjects[0]
    return f"{what} · {request.steps} step{'s'[: request.steps - 1]} · seed {request.seed}"


def figure(result: Result, subjects: Sequence[str], seed: int) -> str:
    """A result as HTML, with each image in a data address."""
    images = "".join(
        f'<img src="{address(image)}" alt="{html.escape(subject)}" title="{html.escape(subject)}">'
        for image, subject in zip(result.images, subjects, strict=True)
    )
    sharp = " sharp" if max(result.images.shape[-2:]) <= SMALL else ""
    few = " few" if len(result.images) < 5 else ""
    each = "image" if result.images.ndim == 4 else "video"
    cost = f"{result.nfe} network evaluation{'s'[: result.nfe - 1]} per {each}"
    cost += f" · guidance {result.guidance:g}" if result.guidance != 1 else ""
    cost += f" · {result.seconds:.2f} s · seed {seed}"
    return (
        f'<figure class="fewstep-result"><figcaption><strong>{result.name}</strong> <span>{cost}</span></figcaption>'
        f'<div class="images{sharp}{few}">{images}</div></figure>'
    )


def thumbnail(results: Sequence[Result], text: str) -> str:
    """Earlier results as HTML, small enough that many can be kept."""
    parts = []
    for result in results:
        first = result.images[:4, 0] if result.images.ndim == 5 else result.images[:4]
        small = image_grid(first, columns=2)
        small.thumbnail((160, 160))
        parts.append(f'<span><img src="{png(small)}" alt="">{result.name}</span>')
    return f"<figure><div>{''.join(parts)}</div><figcaption>{html.escape(text)}</figcaption></figure>"


def gallery(kept: Sequence[str]) -> str:
    """Earlier results, the last one first."""
    return (
        f'<section class="fewstep-earlier"><h2>Earlier results</h2><div>{"".join(kept)}</div></section>' if kept else ""
    )


def address(sample: Tensor) -> str:
    """An image, uint8 [C, H, W], as PNG or a video, uint8 [F, 3, H, W], as GIF, in a data address."""
    frames = [
        image_grid(frame[None], columns=1, scale=1, gap=0) for frame in (sample[None] if sample.ndim == 3 else sample)
    ]
    if len(frames) == 1:
        return png(frames[0])
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=60, loop=0)
    return f"data:image/gif;base64,{base64.b64encode(file.getvalue()).decode()}"


def png(image: Any) -> str:
    """A Pillow image in a data address."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
