"""`make screenshots`: pictures of the report page and of TensorBoard of a real run, in docs/pictures.

`python -m reference_pages.screenshots [RUN]` trains the shipped recipe clm (minutes on two cores), or takes a finished
run, and needs Chromium.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PICTURES = Path(__file__).parent.parent / "pictures"
PTFT = (sys.executable, "-m", "ptft_dist")
_NAMES = ("chromium", "chromium-browser", "google-chrome")
_WORDS = ("--headless", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars")
_SOFTWARE_GL = ("--use-angle=swiftshader", "--enable-unsafe-swiftshader")  # TensorBoard draws with WebGL
_DRAWN_MS = 20_000
"""Virtual time that a page gets to draw its plots."""


def main(run: Path | None) -> None:
    chromium = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if chromium is None:
        sys.exit("Chromium is not installed: apt-get install chromium")
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        if run is None:
            run = Path(folder) / "runs/clm"
            subprocess.run([*PTFT, "train", "clm", f"run_dir={run}", "--launch", "cpu", "--processes", "2"], check=True)
        page = Path(folder) / "report.html"
        subprocess.run([*PTFT, "report", str(run), "--html", str(page)], check=True)
        take(chromium, page.as_uri(), PICTURES / "report.png", height=620)
        port = free_port()
        board = subprocess.Popen([*PTFT, "tensorboard", str(run), "--port", str(port)], stderr=subprocess.DEVNULL)
        try:
            wait_for(port)
            board_url = f"http://localhost:{port}/?darkMode=false#custom_scalars&_smoothingWeight=0"
            take(chromium, board_url, PICTURES / "tensorboard.png", height=480)
        finally:
            board.terminate()
            board.wait()


def take(chromium: str, url: str, picture: Path, height: int) -> None:
    """Write a picture of a page, 1200 pixels wide."""
    words = [f"--window-size=1200,{height}", f"--virtual-time-budget={_DRAWN_MS}", f"--screenshot={picture}", url]
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [chromium, *_WORDS, *_SOFTWARE_GL, f"--user-data-dir={profile}", *words],
            check=True,
            stderr=subprocess.DEVNULL,
        )
    print(f"{picture} ({picture.stat().st_size / 1000:.0f} kB)")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_for(port: int, timeout_s: float = 120) -> None:
    """Wait until a server answers."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection(("localhost", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
