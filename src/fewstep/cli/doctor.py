"""``fewstep doctor``: what works here."""

from __future__ import annotations

from typing import Any

import typer

from fewstep.cli.options import JsonFile, check_json, print_text, write_json

app = typer.Typer()


@app.command(epilog="Example: fewstep doctor")
def doctor(file: JsonFile = None) -> None:
    """Show what works here: devices, memory, attention kernels, extras, weights of metrics, disk, caches, versions."""
    from fewstep.api.doctor import doctor as examine

    check_json(file)
    found = examine()
    if file is not None:
        write_json(found, file)
        if str(file) == "-":
            return
    for title, lines in sections(found).items():
        print_text(title, "bold")
        for line in lines:
            print_text(f"  {line}")


def sections(found: dict[str, Any]) -> dict[str, list[str]]:
    """The findings as lines under titles."""
    cpu = found["cpu"]
    return {
        "Versions": [", ".join(f"{name} {version}" for name, version in found["versions"].items())],
        "Devices": [
            f"processors: {cpu['processors']}, of which this process may use {cpu['for_this_process']}; threads of "
            f"torch: {cpu['threads']}; memory: {cpu['memory']} GiB, {cpu['free']} free",
            *map(device, found["devices"]),
        ],
        "Extras": [
            f"{name}: " + ("installed" if extra["installed"] else f"missing; pip install 'fewstep[{name}]'")
            for name, extra in found["extras"].items()
        ],
        "Weights of metrics": [f"{name}: {weights['file'] or 'missing'}" for name, weights in found["weights"].items()],
        "Folders": [
            f"{name}: {folder['path']}"
            + ("" if folder["exists"] else " (does not exist yet)")
            + (f" ({folder['free']} GiB free)" if "free" in folder else "")
            for name, folder in found["folders"].items()
        ],
        "Bundled models": [", ".join(found["bundled"])],
        "Usable": found["usable"],
        "Not usable": found["missing"] or ["nothing: all extras and weights are here"],
    }


def device(found: dict[str, Any]) -> str:
    """A device in one line."""
    memory = f", {found['memory']} GiB of memory, {found['free']} free" if "memory" in found else ""
    count = f", {found['count']} of them" if found.get("count", 1) > 1 else ""
    if not found["works"]:
        return f"{found['device']}: {found['name']}{memory} does not compute: {found.get('error', 'a wrong sum')}"
    return f"{found['device']}: {found['name']}{count}{memory}; attention: {', '.join(found['attention'])}"
