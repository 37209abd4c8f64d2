"""`ptft doctor`: what of this machine matters for training, and what is wrong with it."""

from __future__ import annotations

import json as json_library
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def doctor(
    folder: Annotated[Path, typer.Option(help="Where runs would be written.")] = Path(),
    handshake: Annotated[bool, typer.Option(help="Let two processes meet, about 10 seconds.")] = True,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Look at packages, GPUs, disks, network, Slurm and launch configs; exit code 1 if something must be repaired."""
    from ptft_dist.doctor import examine

    found, topic = [], ""
    for finding in examine(folder, handshake=handshake):
        found.append(finding)
        if json:
            continue
        if finding.topic != topic:
            topic = finding.topic
            print(topic)
        mark = {"ok": "ok     ", "warning": "WARNING", "error": "ERROR  ", "absent": "-      "}[finding.level]
        print(f"  {mark} {finding.name}: {finding.text}", flush=True)
        if finding.remedy:
            print(f"          {finding.remedy}")
    if json:
        print(json_library.dumps([asdict(each) for each in found], indent=1))
    counts = {level: sum(each.level == level for each in found) for level in ("error", "warning")}
    if not json:
        print(f"{counts['error']} errors, {counts['warning']} warnings")
    if counts["error"]:
        raise typer.Exit(1)
