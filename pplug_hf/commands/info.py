"""`pplug-hf info`: what is in a plug folder, without loading its backbone."""

from __future__ import annotations

from ..modeling import plug_folder as files
from ..modeling.frozen import describe
from .options import InfoSettings


def info(settings: InfoSettings) -> None:
    """Print it."""
    config = files.load_config(settings.plug)
    weights = files.load_weights(settings.plug)
    numbers = sum(tensor.numel() for tensor in weights.values())
    size = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    own = sum(tensor.numel() for key, tensor in weights.items() if not key.startswith("plug.input_encoder."))
    for name, value in (
        ("backbone", f"{config.backbone} {describe(config.backbone_fingerprint or {})}"),
        ("encoder", f"{config.encoder} {describe(config.encoder_fingerprint or {})}"),
        ("trained", f"{numbers:,} parameters, {size / 1e6:.1f} MB ({own:,} without the input encoder)"),
        ("soft prompt", f"{config.prefix_length} tokens of width {config.hidden_size}, {config.aggregator}"),
        ("item template", config.item_template),
    ):
        print(f"{name:14}{value}")
