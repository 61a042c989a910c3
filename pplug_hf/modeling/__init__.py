"""The mathematics: encoders, aggregators, the plug, and the composite with a frozen backbone."""

from .persona import EncoderSpec, Persona
from .personalizer import Personalizer
from .plug import PersonaPlug
from .plug_model import PPlugModel
from .pplug import PPlugForConditionalGeneration

__all__ = ["EncoderSpec", "PPlugForConditionalGeneration", "PPlugModel", "Persona", "PersonaPlug", "Personalizer"]
