"""What a Space shows: a form for the metric beside this file."""

from pathlib import Path

import evaluate
from evaluate.utils import launch_gradio_widget

launch_gradio_widget(evaluate.load(str(Path(__file__).with_name("lamp_accuracy.py"))))
