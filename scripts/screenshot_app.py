"""Take the picture of the page for the documentation.

pplug-hf app --max_new_tokens 8 &
python scripts/screenshot_app.py --output docs/_static/app.png
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from browser import Browser


def main() -> None:
    """Ask the first question, and save what is seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--address", default="http://127.0.0.1:7860")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        browser = Browser(Path(folder), (1200, 815))
        try:
            browser.open(arguments.address, "!!document.querySelector('#items textarea')?.value")
            browser.click("#ask")
            browser.wait("document.querySelector('#another textarea').value && !document.querySelector('.generating')")
            browser.fill("#user textarea, #user input", "ann")
            browser.click("#store")
            browser.wait("document.querySelector('#status').innerText.includes('Stored')")
            browser.js("document.activeElement.blur(); new Promise(done => setTimeout(done, 1500))")
            browser.screenshot(arguments.output)
        finally:
            browser.close()


if __name__ == "__main__":
    main()
