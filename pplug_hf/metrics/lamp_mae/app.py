"""Form of a Space for the metric next to this file."""

from pathlib import Path

import evaluate
from evaluate.utils import launch_gradio_widget

launch_gradio_widget(evaluate.load(str(Path(__file__).with_name("lamp_mae.py"))))
